// The products of training_attention, which leave out keys that no row of a block sees.
#pragma once

#include <cstdint>

#include "common/register_product.h"
#include "training_attention/row_tiles.h"

namespace lpd {
namespace {

constexpr int64_t kTileStride = kTrainingTileStride;

// From element [row, column] of a tile on, and of its transpose.
inline Matrix<float, Fixed<kTileStride>> tile_from(float* tile, int64_t row, int64_t column) {
  return {tile + row * kTileStride + column, {}};
}
inline Matrix<const float, Fixed<kTileStride>> tile_from(const float* tile, int64_t row, int64_t column) {
  return {tile + row * kTileStride + column, {}};
}
inline Matrix<const float, Fixed<1>, Fixed<kTileStride>> transposed_from(const float* tile, int64_t row,
                                                                         int64_t column) {
  return {tile + row * kTileStride + column, {}};
}

inline int vectors(int count) { return (count + Vec::kWidth - 1) / Vec::kWidth; }

// out[row, key] = x[row, :] y^T[:, key] over the span: x, out tiles; columns [D, stride] hold the transposed keys.
void score_span(const KeySpan& span, int head_dim, const float* x, const float* columns, int64_t stride, float* out) {
  const int block_rows = rows_per_block(span.end - span.begin);
  FetchNothing nothing;
  for_each_column_block(vectors(span.num_keys), [&](int column, int vecs) {
    for (int r = span.begin; r < span.end; r += block_rows) {
      const int rows = span.end - r < block_rows ? span.end - r : block_rows;
      if (span.count[r + rows - 1] <= column) continue;
      product<Floats>(rows, vecs, tile_from(x, r, 0), Matrix{columns + span.key + column, stride}, head_dim,
                      tile_from(out, r, column), std::false_type(), nothing);
    }
  });
}

// sums[row, :] += weights[row, key] rows[key, :] over the span; weights, sums tiles.
void add_rows(const KeySpan& span, int head_dim, const float* weights, const float* rows_of_keys, int64_t stride,
              float* sums) {
  const int block_rows = rows_per_block(span.end - span.begin);
  FetchNothing nothing;
  for_each_column_block(vectors(head_dim), [&](int column, int vecs) {
    for (int r = span.begin; r < span.end; r += block_rows) {
      const int rows = span.end - r < block_rows ? span.end - r : block_rows;
      product<Floats>(rows, vecs, tile_from(weights, r, 0), Matrix{rows_of_keys + span.key * stride + column, stride},
                      span.count[r + rows - 1], tile_from(sums, r, column), true, nothing);
    }
  });
}

// sums[key, :] += weights[row, key] x[row, :] over the span; weights, x tiles.
void add_to_keys(const KeySpan& span, int head_dim, const float* weights, const float* x, float* sums, int64_t stride) {
  const int block_keys = rows_per_block(span.num_keys);
  FetchNothing nothing;
  for_each_column_block(vectors(head_dim), [&](int column, int vecs) {
    int first = span.begin;
    for (int key = 0; key < span.num_keys; key += block_keys) {
      const int keys = span.num_keys - key < block_keys ? span.num_keys - key : block_keys;
      while (span.count[first] <= key) ++first;
      product<Floats>(keys, vecs, transposed_from(weights, first, key), tile_from(x, first, column), span.end - first,
                      Matrix{sums + (span.key + key) * stride + column, stride}, true, nothing);
    }
  });
}

}  // namespace
}  // namespace lpd
