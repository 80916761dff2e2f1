// quantize_rows on the CPU. Limited by bandwidth: a row is read from memory once, and a byte an element is written.
#include <cstdlib>
#include <new>

#include "common/cpu_kernels.h"
#include "row_quantization/quantize_row.h"

namespace lpd::LPD_ISA {
namespace {

template <class T>
void quantize_row_range(const QuantizeRowsParams& p, int64_t begin, int64_t end) {
  const size_t row_bytes = static_cast<size_t>(p.width) * sizeof(float);
  float* const values = static_cast<float*>(std::malloc(row_bytes + 1));  // + 1: not nullptr for empty rows
  if (!values) throw std::bad_alloc();
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    quantize_row(x, p.width, p.out, row, values, row + 1 < end ? x + p.x_stride : x);
  }
  std::free(values);  // nothing in between throws; a container would add weak references to the unit
}

}  // namespace

void quantize_rows(const QuantizeRowsParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto element) { quantize_row_range<decltype(element)>(p, begin, end); });
}

}  // namespace lpd::LPD_ISA
