// embed_rows on the CPU: gather two table rows, add into the output row, normalise it in place. Limited by bandwidth,
// two table rows read and 4E bytes written, and by the wait for the beginning of a row. What comes of a scale is for
// tests: simple, not fast.
#include "common/cpu_kernels.h"
#include "common/layer_norm_row.h"
#include "common/row_statistics.h"

namespace lpd::LPD_ISA {
namespace {

template <class T>
void embed_row_range(const EmbedRowsParams& p, int64_t begin, int64_t end) {
  const auto out_at = [&](int64_t row) { return p.x + row * p.width; };
  const auto row_at = [&](int64_t row) {
    const int64_t content = id_of(p.content_ids, p.content_index, p.num_content_ids, row);
    const int64_t position = id_of(p.positions, p.position_index, p.num_position_ids, row);
    return SumRow<T, T>{static_cast<const T*>(p.content) + content * p.content_stride,
                        static_cast<const T*>(p.position_embedding) + position * p.position_stride, out_at(row)};
  };
  layer_norm_rows(begin, end, static_cast<const T*>(p.weight), static_cast<const T*>(p.bias), p.width, p.eps, row_at,
                  out_at);
}

template <class T>
void scale_row_range(const EmbedRowsParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = row * p.width;
    scale_row(p.x + first, static_cast<const T*>(p.scale), p.width, static_cast<T*>(p.scaled) + first,
              p.statistics + first / kStatisticsColumns * 2);
  }
}

}  // namespace

void embed_rows(const EmbedRowsParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto element) { embed_row_range<decltype(element)>(p, begin, end); });
  if (p.scale == nullptr) return;
  dispatch_dtype16(p.dtype, [&](auto element) { scale_row_range<decltype(element)>(p, begin, end); });
}

}  // namespace lpd::LPD_ISA
