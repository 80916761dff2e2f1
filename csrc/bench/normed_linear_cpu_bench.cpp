// fc1 of lpd_l by the CPU's kernel, which the tests compare others with: packed_linear is what decodes on a CPU.
#include "cpu_bench.h"
#include "few_row_layers.h"

namespace lpd::bench {

Work normed_linear_work(const Shape& shape, int32_t batch) {
  const int64_t rows = rows_of(shape, batch);
  struct Data {
    Bfloats rows, weight, output;
    Floats statistics, slope, shift;
  };
  auto data = std::make_shared<Data>();
  data->rows = random_bfloats(rows * kFc1.depth);
  data->weight = random_bfloats(kFc1.weights());
  data->output = Bfloats(static_cast<size_t>(rows * kFc1.features));
  data->statistics = Floats(static_cast<size_t>(rows * kFc1.depth / 32 * 2), 1.0f);
  data->slope = data->shift = random_floats(kFc1.features);
  NormedLinearParams p{};
  static_cast<FewRowProduct&>(p) =
      few_row_product(*data, static_cast<int32_t>(rows), kFc1.features, kFc1.depth, DType::kBFloat16);
  p.statistics = data->statistics.data();
  p.slope = data->slope.data();
  p.shift = data->shift.data();
  p.output = data->output.data();
  p.eps = 1e-6f;
  p.gelu = true;
  Work work = make_work(cpu_kernels().normed_linear, p, std::move(data), rows);
  work.flops = kFc1.flops(rows);
  return work;
}

}  // namespace lpd::bench
