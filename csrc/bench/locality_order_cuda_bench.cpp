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
  const struct {
    DeviceArray<int32_t> group_sizes;
    DeviceArray<int64_t> seeds, order;
  } arrays{std::vector<int32_t>(schedule.group_sizes, schedule.group_sizes + schedule.steps), keys,
           std::vector<int64_t>(static_cast<size_t>(int64_t{batch} * cells))};
  LocalityOrderParams p = locality_order_params(arrays, batch, schedule.grid());
  p.order = arrays.order.data();
  measure(state, shape, 8.0 * batch * cells, [&](cudaStream_t stream) { launch_locality_order(p, stream); });
}
BENCHMARK(locality_order)->Apply(all_shapes);

}  // namespace
}  // namespace lpd::bench
