#include "cpu_bench.h"

namespace lpd::bench {

Work embed_rows_work(const Shape& shape, int32_t batch) {
  const int64_t rows = int64_t{2} * batch * (shape.num_context + shape.num_query);
  const int64_t contents = kVocab + kClasses, positions = 1 + shape.schedule().height * shape.schedule().width;
  struct Data {
    std::vector<int64_t> content_ids, positions;
    Floats content, position_embedding, weight, bias, x;
  };
  auto data = std::make_shared<Data>(Data{random_ids<int64_t>(rows, contents), random_ids<int64_t>(rows, positions),
                                          random_floats(contents * kWidth), random_floats(positions * kWidth),
                                          random_floats(kWidth), random_floats(kWidth),
                                          Floats(static_cast<size_t>(rows * kWidth))});
  EmbedRowsParams p = embed_rows_params(*data, rows, contents, positions, kWidth, DType::kFloat32);
  p.x = data->x.data();
  Work work = make_work(cpu_kernels().embed_rows, p, std::move(data), rows);
  work.bytes = static_cast<double>(rows) * (16 + kWidth * (4 + 4 + 4));
  return work;
}

}  // namespace lpd::bench
