// The matrix product of all CPU kernels: a block of sums stays in registers while the factors stream by. Policies say
// what a word of the factors is (product_words.h), where it stands (Matrix) and what is fetched from memory meanwhile
// (fetch_ahead.h).
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/fetch_ahead.h"
#include "common/product_words.h"
#include "common/simd.h"

namespace lpd {
namespace {

// Rows x vectors of a block: as many sums as leave registers for the operands.
#if defined(LPD_ISA_AVX512)
constexpr int kBlockRows = 12, kBlockVecs = 2;
#elif defined(LPD_ISA_AVX2)
constexpr int kBlockRows = 6, kBlockVecs = 2;
#else
constexpr int kBlockRows = 4, kBlockVecs = 8;
#endif

// A stride that is known to the compiler, so that one pointer addresses all rows of a block.
template <int64_t stride>
using Fixed = std::integral_constant<int64_t, stride>;

// Element [row, column] is data[row * row_stride + column * column_stride]; strides are int64_t or Fixed.
template <class T, class RowStride, class ColumnStride = Fixed<1>>
struct Matrix {
  T* data;
  RowStride row_stride;
  ColumnStride column_stride{};

  T* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
  Matrix from(int64_t row, int64_t column) const { return {at(row, column), row_stride, column_stride}; }
};
template <class T, class RowStride>
Matrix(T*, RowStride) -> Matrix<T, RowStride>;
template <class T, class RowStride, class ColumnStride>
Matrix(T*, RowStride, ColumnStride) -> Matrix<T, RowStride, ColumnStride>;

// c[kRows, kVecs * kWidth] = a[kRows, depth] b[depth, kVecs * kWidth] in words of a and b, added to c if `accumulate`,
// which is a bool, or std::false_type for words whose sums cannot be taken up again.
template <class Words, int kRows, int kVecs, class A, class B, class C, class Accumulate, class Fetch>
void product_block(A a, B b, int depth, C c, Accumulate accumulate, Fetch& fetch) {
  constexpr int kWidth = Vec::kWidth;
  typename Words::Sum sum[kRows][kVecs];
  LPD_UNROLL for (int r = 0; r < kRows; ++r) {
    LPD_UNROLL for (int v = 0; v < kVecs; ++v) {
      if constexpr (std::is_same_v<Accumulate, bool>) {
        sum[r][v] = accumulate ? Words::sum(load(c.at(r, v * kWidth))) : Words::zero();
      } else {
        sum[r][v] = Words::zero();
      }
    }
  }
  auto&& ahead = fetch.begin_block();
  for (int k = 0; k < depth;) {
    auto run = ahead.next();
    const int stop = run.steps < depth - k ? k + run.steps : depth;
    for (; k < stop; ++k) {
      run.step();
      typename Words::Columns columns[kVecs];
      LPD_UNROLL for (int v = 0; v < kVecs; ++v) columns[v] = Words::columns(b.at(k, v * kWidth));
      LPD_UNROLL for (int r = 0; r < kRows; ++r) {
        const typename Words::Row row = Words::row(a.at(r, k));
        LPD_UNROLL for (int v = 0; v < kVecs; ++v) sum[r][v] = Words::add(sum[r][v], row, columns[v]);
      }
    }
  }
  LPD_UNROLL for (int r = 0; r < kRows; ++r) {
    LPD_UNROLL for (int v = 0; v < kVecs; ++v) store(c.at(r, v * kWidth), Words::value(sum[r][v]));
  }
}

template <class Words, int kRows, int kVecs, class A, class B, class C, class Accumulate, class Fetch>
void product_rows(int rows, A a, B b, int depth, C c, Accumulate accumulate, Fetch& fetch) {
  if (rows == kRows) return product_block<Words, kRows, kVecs>(a, b, depth, c, accumulate, fetch);
  if constexpr (kRows > 1) product_rows<Words, kRows - 1, kVecs>(rows, a, b, depth, c, accumulate, fetch);
}

// As product_block, of 1 to kBlockRows rows and one vector or kBlockVecs.
template <class Words, class A, class B, class C, class Accumulate, class Fetch>
void product(int rows, int vecs, A a, B b, int depth, C c, Accumulate accumulate, Fetch& fetch) {
  if (vecs == 1) return product_rows<Words, kBlockRows, 1>(rows, a, b, depth, c, accumulate, fetch);
  product_rows<Words, kBlockRows, kBlockVecs>(rows, a, b, depth, c, accumulate, fetch);
}

// `count` rows are shared out evenly over blocks of at most kBlockRows.
inline int rows_per_block(int count) {
  const int blocks = (count + kBlockRows - 1) / kBlockRows;
  return (count + blocks - 1) / blocks;
}

// Calls use(column, vecs) for the blocks of columns that together are `vecs` vectors.
template <class Use>
void for_each_column_block(int vecs, const Use& use) {
  for (int v = 0; v < vecs;) {
    const int taken = vecs - v >= kBlockVecs ? kBlockVecs : 1;
    use(v * Vec::kWidth, taken);
    v += taken;
  }
}

// As product_block, of any number of rows and vectors.
template <class Words, class A, class B, class C, class Accumulate, class Fetch>
void multiply(int rows, int vecs, A a, B b, int depth, C c, Accumulate accumulate, Fetch& fetch) {
  if (rows <= 0) return;
  const int block_rows = rows_per_block(rows);
  for_each_column_block(vecs, [&](int column, int block_vecs) {
    for (int r = 0; r < rows; r += block_rows) {
      product<Words>(rows - r < block_rows ? rows - r : block_rows, block_vecs, a.from(r, 0), b.from(0, column), depth,
                     c.from(r, column), accumulate, fetch);
    }
  });
}

}  // namespace
}  // namespace lpd
