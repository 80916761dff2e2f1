// The register-blocked product that scores and values of group_attention share, and the prefetch that hides behind it.
#pragma once

#include <cstdint>

#include "common/register_block.h"
#include "common/simd.h"

namespace lpd {
namespace {

// Row stride of every scratch matrix. A constant lets one pointer address all rows of a block; the odd number of cache
// lines (17) spreads rows over the sets of L1.
constexpr int kScratchStride = 256 + 16;

// Rows of memory that will be needed next, fetched into L2 one cache line per step of a product: a wait for memory then
// costs little beside its FMAs. L-256-20 step 15, B = 16, with guidance, on one core: an item takes 12 us when
// everything is in L2, 31 us from memory without this, 21 us with it. Slower: bursts between products, fetching into
// L1, non-temporal hints, mixing the ranges.
class FetchAhead {
 public:
  // `idle` is fetched once all rows are.
  FetchAhead(const void* idle, int64_t row_bytes)
      : idle_(static_cast<const char*>(idle)), row_lines_(static_cast<int>((row_bytes + kLine - 1) / kLine)) {}

  // Ranges are fetched last added first.
  void add(const void* first, int64_t stride_bytes, int64_t count) {
    if (count > 0) ranges_[num_ranges_++] = {static_cast<const char*>(first), stride_bytes, count};
  }

  const char* next_row() {
    if (num_ranges_ == 0) return idle_;
    Rows& range = ranges_[num_ranges_ - 1];
    const char* row = range.first;
    range.first += range.stride;
    if (--range.count == 0) --num_ranges_;
    return row;
  }

  int row_lines() const { return row_lines_; }

  static constexpr int kLine = 64;

 private:
  struct Rows {
    const char* first;
    int64_t stride;
    int64_t count;
  };
  Rows ranges_[10];
  int num_ranges_ = 0;
  const char* idle_;
  int row_lines_;
};

// c[Rows, Vecs * kWidth] = a[Rows, depth] b[depth, Vecs * kWidth], added to c if `accumulate`. a and c are scratch
// matrices.
template <int Rows, int Vecs>
void multiply_block(const float* a, const float* b, int64_t b_stride, int depth, float* c, bool accumulate,
                    FetchAhead& ahead) {
  constexpr int kWidth = Vec::kWidth;
  Vec sum[Rows][Vecs];
  LPD_UNROLL for (int r = 0; r < Rows; ++r) {
    LPD_UNROLL for (int v = 0; v < Vecs; ++v) {
      sum[r][v] = accumulate ? load(c + r * kScratchStride + v * kWidth) : broadcast(0.0f);
    }
  }
  for (int k = 0; k < depth;) {
    const char* line = ahead.next_row();
    const int stop = k + ahead.row_lines() < depth ? k + ahead.row_lines() : depth;
    for (; k < stop; ++k, line += FetchAhead::kLine) {
      __builtin_prefetch(line, 0, 2);
      Vec right[Vecs];
      LPD_UNROLL for (int v = 0; v < Vecs; ++v) right[v] = load(b + k * b_stride + v * kWidth);
      LPD_UNROLL for (int r = 0; r < Rows; ++r) {
        const Vec left = broadcast(a[r * kScratchStride + k]);
        LPD_UNROLL for (int v = 0; v < Vecs; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
      }
    }
  }
  LPD_UNROLL for (int r = 0; r < Rows; ++r) {
    LPD_UNROLL for (int v = 0; v < Vecs; ++v) store(c + r * kScratchStride + v * kWidth, sum[r][v]);
  }
}

template <int Rows, int Vecs>
void multiply_rows(int rows, const float* a, const float* b, int64_t b_stride, int depth, float* c, bool accumulate,
                   FetchAhead& ahead) {
  if (rows == Rows) return multiply_block<Rows, Vecs>(a, b, b_stride, depth, c, accumulate, ahead);
  if constexpr (Rows > 1) multiply_rows<Rows - 1, Vecs>(rows, a, b, b_stride, depth, c, accumulate, ahead);
}

// As multiply_block, for any number of rows and vectors; rows are shared out evenly over the blocks.
void multiply(int rows, int vecs, const float* a, const float* b, int64_t b_stride, int depth, float* c,
              bool accumulate, FetchAhead& ahead) {
  if (rows <= 0) return;
  const int blocks = (rows + kBlockRows - 1) / kBlockRows, block_rows = (rows + blocks - 1) / blocks;
  for (int v = 0; v < vecs;) {
    const bool full = v + kBlockVecs <= vecs;
    const auto product = full ? multiply_rows<kBlockRows, kBlockVecs> : multiply_rows<kBlockRows, 1>;
    const int64_t column = int64_t{v} * Vec::kWidth;
    for (int r = 0; r < rows; r += block_rows) {
      product(rows - r < block_rows ? rows - r : block_rows, a + r * kScratchStride, b + column, b_stride, depth,
              c + r * kScratchStride + column, accumulate, ahead);
    }
    v += full ? kBlockVecs : 1;
  }
}

}  // namespace
}  // namespace lpd
