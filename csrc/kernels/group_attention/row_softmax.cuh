// Online softmax of the rows that a lane has a share of, in powers of two.
#pragma once

#include "common/ptx.cuh"

namespace lpd {
namespace {

constexpr float kMinusInfinity = -__builtin_huge_valf();

// What scores are counted from: -inf - -inf would be NaN.
__device__ __forceinline__ float softmax_reference(float top) { return top == kMinusInfinity ? 0.0f : top; }

// Each row is spread over kLanes neighbouring lanes, which all know its maximum; each has its own part of the sum.
template <int kRows, int kLanes>
struct RowSoftmax {
  float top[kRows];
  float sum[kRows];

  __device__ __forceinline__ RowSoftmax() {
#pragma unroll
    for (int row = 0; row < kRows; ++row) top[row] = kMinusInfinity, sum[row] = 0.0f;
  }

  // Turns this lane's scores, at(row, column), into weights 2^(score - maximum so far). Sums made with earlier maxima
  // are to be multiplied by shrink. A NaN score becomes a NaN weight.
  template <int kColumns, class At>
  __device__ __forceinline__ void update(const At& at, float (&shrink)[kRows]) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float new_top = top[row];
#pragma unroll
      for (int column = 0; column < kColumns; ++column) new_top = fmaxf(new_top, at(row, column));
#pragma unroll
      for (int lane = 1; lane < kLanes; lane *= 2) new_top = fmaxf(new_top, __shfl_xor_sync(~0u, new_top, lane));
      const float reference = softmax_reference(new_top);
      shrink[row] = ptx::exp2_approx(top[row] - reference);
      top[row] = new_top;
      float tile_sum = 0.0f;
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        const float weight = ptx::exp2_approx(at(row, column) - reference);
        at(row, column) = weight;
        tile_sum += weight;
      }
      sum[row] = sum[row] * shrink[row] + tile_sum;
    }
  }

  // Of the whole row.
  __device__ __forceinline__ float total(int row) const {
    float total = sum[row];
#pragma unroll
    for (int lane = 1; lane < kLanes; lane *= 2) total += __shfl_xor_sync(~0u, total, lane);
    return total;
  }
};

}  // namespace
}  // namespace lpd
