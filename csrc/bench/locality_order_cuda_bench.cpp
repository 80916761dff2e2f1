#include "cuda_bench.h"
#include "locality_order/locality_order.h"

namespace lpd::bench {
namespace {

void locality_order(benchmark::State& state) {
  const Shape& shape = kShapes[state.range(0)];
  const auto batch = static_cast<int32_t>(state.range(1));
  const int32_t cells = shape.height * shape.width, steps = shape.height == 16 ? 20 : 48;
  // Sizes that grow evenly stand for the cosine schedule.
  std::vector<int32_t> sizes;
  for (int32_t t = 0, sum = 0; t < steps; ++t) {
    sizes.push_back(static_cast<int32_t>(int64_t{cells} * (t + 1) * (t + 2) / (int64_t{steps} * (steps + 1))) - sum);
    sum += sizes.back();
  }
  std::vector<int64_t> keys;
  for (int32_t b = 0; b < batch; ++b) keys.push_back(b);
  const DeviceArray<int32_t> group_sizes(sizes);
  const DeviceArray<int64_t> seeds(keys), order(std::vector<int64_t>(static_cast<size_t>(int64_t{batch} * cells)));
  LocalityOrderParams p{};
  p.group_sizes = group_sizes.get();
  p.seeds = seeds.get();
  p.order = order.get();
  p.batch = batch;
  p.steps = steps;
  p.height = shape.height;
  p.width = shape.width;
  p.repulsion_threshold = shape.height == 16 ? 2 : 4;
  set_proximity_threshold(p, 1.0);
  measure(state, shape, 8.0 * batch * cells, [&](cudaStream_t stream) { launch_locality_order(p, stream); });
}
BENCHMARK(locality_order)->Apply(all_shapes);

}  // namespace
}  // namespace lpd::bench
