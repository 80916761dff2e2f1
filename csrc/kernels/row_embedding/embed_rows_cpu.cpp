// embed_rows on the CPU: gather two table rows, add into the output row, normalise it in place. Limited by bandwidth:
// two table rows read, 4E bytes written.
#include "common/cpu_kernels.h"
#include "common/layer_norm_row.h"

namespace lpd::LPD_ISA {
namespace {

template <class T>
void embed_row_range(const EmbedRowsParams& p, int64_t begin, int64_t end) {
  constexpr int kWidth = Vec::kWidth;
  const int full = p.width / kWidth * kWidth;
  for (int64_t row = begin; row < end; ++row) {
    const T* content = static_cast<const T*>(p.content) + p.content_ids[row] * p.content_stride;
    const T* position = static_cast<const T*>(p.position_embedding) + p.positions[row] * p.position_stride;
    float* x = p.x + row * p.width;
    for (int i = 0; i < full; i += kWidth) store(x + i, load(content + i) + load(position + i));
    for (int i = full; i < p.width; ++i) x[i] = to_float(content[i]) + to_float(position[i]);
    layer_norm_row(x, static_cast<const T*>(p.weight), static_cast<const T*>(p.bias), x, p.width, p.eps);
  }
}

}  // namespace

void embed_rows(const EmbedRowsParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32: return embed_row_range<float>(p, begin, end);
    case DType::kBFloat16: return embed_row_range<BFloat16>(p, begin, end);
    case DType::kFloat16: return embed_row_range<Float16>(p, begin, end);
  }
}

}  // namespace lpd::LPD_ISA
