#include "cpu_bench.h"

namespace lpd::bench {

Work locality_order_work(const Schedule& schedule) {
  struct Data {
    std::vector<int32_t> group_sizes;
    std::vector<int64_t> seeds, order;
  };
  auto data = std::make_shared<Data>();
  data->group_sizes.assign(schedule.group_sizes, schedule.group_sizes + schedule.steps);
  data->seeds.resize(1);
  data->order.resize(static_cast<size_t>(schedule.height) * schedule.width);
  LocalityOrderParams p = locality_order_params(*data, 1, schedule.grid());
  p.order = data->order.data();
  Work work;
  work.items = 1;
  work.kernel = [kernel = cpu_kernels().locality_order, p, data = std::move(data)](int64_t begin, int64_t end) {
    ++data->seeds[0];  // another order every time: branches and bits are then no better predicted than in use
    kernel(p, begin, end);
  };
  return work;
}

}  // namespace lpd::bench
