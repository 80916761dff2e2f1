#include "cpu_bench.h"

namespace lpd::bench {

Work locality_order_work(const Schedule& schedule) {
  struct Data {
    int64_t seed = 0;
    std::vector<int64_t> order;
  };
  auto data = std::make_shared<Data>();
  data->order.resize(static_cast<size_t>(schedule.height) * schedule.width);
  LocalityOrderParams p{};
  p.group_sizes = schedule.group_sizes;
  p.seeds = &data->seed;
  p.order = data->order.data();
  p.batch = 1;
  p.steps = schedule.steps;
  p.height = schedule.height;
  p.width = schedule.width;
  p.repulsion_threshold = schedule.repulsion_threshold;
  set_proximity_threshold(p, 1.0);
  Work work;
  work.items = 1;
  work.kernel = [kernel = cpu_kernels().locality_order, p, data = std::move(data)](int64_t begin, int64_t end) {
    ++data->seed;  // another order every time: branches and bits are then no better predicted than in use
    kernel(p, begin, end);
  };
  return work;
}

}  // namespace lpd::bench
