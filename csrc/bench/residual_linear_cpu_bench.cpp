// proj of lpd_l by the CPU's kernel, which the tests compare others with: packed_linear is what decodes on a CPU.
#include "cpu_bench.h"
#include "few_row_layers.h"

namespace lpd::bench {

Work residual_linear_work(const Shape& shape, int32_t batch) {
  const int64_t rows = rows_of(shape, batch);
  struct Data {
    Bfloats rows, weight, bias, scale, scaled;
    Floats x, statistics;
  };
  auto data = std::make_shared<Data>();
  data->rows = Bfloats(static_cast<size_t>(rows * kProj.depth));  // of 0, so that x does not grow from call to call
  data->weight = random_bfloats(kProj.weights());
  data->bias = Bfloats(static_cast<size_t>(kProj.features));
  data->scale = random_bfloats(kProj.features);
  data->scaled = Bfloats(static_cast<size_t>(rows * kProj.features));
  data->x = random_floats(rows * kProj.features);
  data->statistics = Floats(static_cast<size_t>(rows * kProj.features / kStatisticsColumns * 2));
  ResidualLinearParams p{};
  static_cast<FewRowProduct&>(p) =
      few_row_product(*data, static_cast<int32_t>(rows), kProj.features, kProj.depth, DType::kBFloat16);
  p.x = data->x.data();
  p.bias = data->bias.data();
  p.scale = data->scale.data();
  p.scaled = data->scaled.data();
  p.statistics = data->statistics.data();
  p.x_stride = kProj.features;
  Work work = make_work(cpu_kernels().residual_linear, p, std::move(data), rows);
  work.flops = kProj.flops(rows);
  return work;
}

}  // namespace lpd::bench
