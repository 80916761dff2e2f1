#include "cuda_bench.h"
#include "locality_order/locality_order.h"

namespace lpd::bench {
namespace {

void locality_order(benchmark::State& state) {
  const Shape& shape = kShapes[state.range(0)];
  const auto batch = static_cast<int32_t>(state.range(1));
  const Schedule& schedule = shape.schedule();
  const int32_t cells = schedule.height * schedule.width;
  std::vector<int64_t> keys;
  for (int32_t b = 0; b < batch; ++b) keys.push_back(b);
  const DeviceArray<int32_t> group_sizes({schedule.group_sizes, schedule.group_sizes + schedule.steps});
  const DeviceArray<int64_t> seeds(keys), order(std::vector<int64_t>(static_cast<size_t>(int64_t{batch} * cells)));
  LocalityOrderParams p{};
  p.group_sizes = group_sizes.get();
  p.seeds = seeds.get();
  p.order = order.get();
  p.batch = batch;
  p.steps = schedule.steps;
  p.height = schedule.height;
  p.width = schedule.width;
  p.repulsion_threshold = schedule.repulsion_threshold;
  set_proximity_threshold(p, 1.0);
  measure(state, shape, 8.0 * batch * cells, [&](cudaStream_t stream) { launch_locality_order(p, stream); });
}
BENCHMARK(locality_order)->Apply(all_shapes);

}  // namespace
}  // namespace lpd::bench
