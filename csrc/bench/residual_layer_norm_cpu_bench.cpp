#include "cpu_bench.h"

namespace lpd::bench {

Work residual_layer_norm_work(const Shape& shape, int32_t batch) {
  const int64_t rows = int64_t{2} * batch * (shape.num_context + shape.num_query);
  struct Data {
    Floats x, delta, weight, bias, normed;
  };
  // Deltas of 0, so that x does not grow from call to call.
  auto data = std::make_shared<Data>(Data{random_floats(rows * kWidth), Floats(static_cast<size_t>(rows * kWidth)),
                                          random_floats(kWidth), random_floats(kWidth),
                                          Floats(static_cast<size_t>(rows * kWidth))});
  ResidualLayerNormParams p = residual_layer_norm_params(*data, rows, kWidth, DType::kFloat32);
  p.x = data->x.data();
  p.normed = data->normed.data();
  Work work = make_work(cpu_kernels().residual_layer_norm, p, std::move(data), rows);
  work.bytes = static_cast<double>(rows) * kWidth * (4 + 4 + 4 + 4);
  return work;
}

}  // namespace lpd::bench
