// The register-blocked products of training_attention, which leave out what no row of a block sees.
#pragma once

#include <cstdint>

#include "common/register_block.h"
#include "common/simd.h"
#include "training_attention/row_tiles.h"

namespace lpd {
namespace {

constexpr int64_t kTileStride = kTrainingTileStride;

// c[Rows, Vecs * kWidth] = a[Rows, depth] b[depth, Vecs * kWidth], added to c if `accumulate`. a is part of a tile, or
// if kTransposed its transpose [depth, Rows] is: either way one pointer addresses all of its rows.
template <int Rows, int Vecs, bool kTransposed>
void product_block(const float* a, const float* b, int64_t b_stride, int depth, float* c, int64_t c_stride,
                   bool accumulate) {
  constexpr int kWidth = Vec::kWidth;
  Vec sum[Rows][Vecs];
  LPD_UNROLL for (int r = 0; r < Rows; ++r) {
    LPD_UNROLL for (int v = 0; v < Vecs; ++v) {
      sum[r][v] = accumulate ? load(c + r * c_stride + v * kWidth) : broadcast(0.0f);
    }
  }
  for (int k = 0; k < depth; ++k) {
    Vec right[Vecs];
    LPD_UNROLL for (int v = 0; v < Vecs; ++v) right[v] = load(b + k * b_stride + v * kWidth);
    LPD_UNROLL for (int r = 0; r < Rows; ++r) {
      const Vec left = broadcast(kTransposed ? a[k * kTileStride + r] : a[r * kTileStride + k]);
      LPD_UNROLL for (int v = 0; v < Vecs; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
    }
  }
  LPD_UNROLL for (int r = 0; r < Rows; ++r) {
    LPD_UNROLL for (int v = 0; v < Vecs; ++v) store(c + r * c_stride + v * kWidth, sum[r][v]);
  }
}

template <int Rows, int Vecs, bool kTransposed>
void product_rows(int rows, const float* a, const float* b, int64_t b_stride, int depth, float* c, int64_t c_stride,
                  bool accumulate) {
  if (rows == Rows) return product_block<Rows, Vecs, kTransposed>(a, b, b_stride, depth, c, c_stride, accumulate);
  if constexpr (Rows > 1) {
    product_rows<Rows - 1, Vecs, kTransposed>(rows, a, b, b_stride, depth, c, c_stride, accumulate);
  }
}

template <bool kTransposed>
void product(int rows, int vecs, const float* a, const float* b, int64_t b_stride, int depth, float* c,
             int64_t c_stride, bool accumulate) {
  const auto block =
      vecs == 1 ? product_rows<kBlockRows, 1, kTransposed> : product_rows<kBlockRows, kBlockVecs, kTransposed>;
  block(rows, a, b, b_stride, depth, c, c_stride, accumulate);
}

inline int vectors(int count) { return (count + Vec::kWidth - 1) / Vec::kWidth; }

// `count` rows are shared out evenly over blocks of at most kBlockRows.
inline int rows_per_block(int count) {
  const int blocks = (count + kBlockRows - 1) / kBlockRows;
  return (count + blocks - 1) / blocks;
}

// out[row, key] = x[row, :] y^T[:, key] over the span: x, out tiles; columns [D, stride] hold the transposed keys.
void score_span(const KeySpan& span, int head_dim, const float* x, const float* columns, int64_t stride, float* out) {
  const int block_rows = rows_per_block(span.end - span.begin);
  for (int v = 0; v * Vec::kWidth < span.num_keys;) {
    const int left = vectors(span.num_keys) - v, vecs = left >= kBlockVecs ? kBlockVecs : 1;
    const int column = v * Vec::kWidth;
    for (int r = span.begin; r < span.end; r += block_rows) {
      const int rows = span.end - r < block_rows ? span.end - r : block_rows;
      if (span.count[r + rows - 1] <= column) continue;
      product<false>(rows, vecs, x + r * kTileStride, columns + span.key + column, stride, head_dim,
                     out + r * kTileStride + column, kTileStride, false);
    }
    v += vecs;
  }
}

// sums[row, :] += weights[row, key] rows[key, :] over the span; weights, sums tiles.
void add_rows(const KeySpan& span, int head_dim, const float* weights, const float* rows_of_keys, int64_t stride,
              float* sums) {
  const int block_rows = rows_per_block(span.end - span.begin), all = vectors(head_dim);
  for (int v = 0; v < all;) {
    const int vecs = all - v >= kBlockVecs ? kBlockVecs : 1, column = v * Vec::kWidth;
    for (int r = span.begin; r < span.end; r += block_rows) {
      const int rows = span.end - r < block_rows ? span.end - r : block_rows;
      product<false>(rows, vecs, weights + r * kTileStride, rows_of_keys + span.key * stride + column, stride,
                     span.count[r + rows - 1], sums + r * kTileStride + column, kTileStride, true);
    }
    v += vecs;
  }
}

// sums[key, :] += weights[row, key] x[row, :] over the span; weights, x tiles.
void add_to_keys(const KeySpan& span, int head_dim, const float* weights, const float* x, float* sums, int64_t stride) {
  const int block_keys = rows_per_block(span.num_keys), all = vectors(head_dim);
  for (int v = 0; v < all;) {
    const int vecs = all - v >= kBlockVecs ? kBlockVecs : 1, column = v * Vec::kWidth;
    int first = span.begin;
    for (int key = 0; key < span.num_keys; key += block_keys) {
      const int keys = span.num_keys - key < block_keys ? span.num_keys - key : block_keys;
      while (span.count[first] <= key) ++first;
      product<true>(keys, vecs, weights + first * kTileStride + key, x + first * kTileStride + column, kTileStride,
                    span.end - first, sums + (span.key + key) * stride + column, stride, true);
    }
    v += vecs;
  }
}

}  // namespace
}  // namespace lpd
