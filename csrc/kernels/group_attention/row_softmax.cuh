// Online softmax of the rows that a lane has a share of, in powers of two.
#pragma once

#include "common/ptx.cuh"
#include "common/softmax_reference.h"

namespace lpd {
namespace {

// Each row is spread over kLanes neighbouring lanes, which all know its maximum; each has its own part of its sum.
template <int kRows, int kLanes>
struct RowSoftmax {
  float row_max[kRows];
  float lane_sum[kRows];

  __device__ __forceinline__ RowSoftmax() {
#pragma unroll
    for (int row = 0; row < kRows; ++row) row_max[row] = kMinusInfinity, lane_sum[row] = 0.0f;
  }

  // Turns this lane's scores, at(row, column), into weights 2^(score - maximum so far). Sums made with earlier maxima
  // are to be multiplied by rescale. A NaN score becomes a NaN weight.
  template <int kColumns, class At>
  __device__ __forceinline__ void update(const At& at, float (&rescale)[kRows]) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float new_max = row_max[row];
#pragma unroll
      for (int column = 0; column < kColumns; ++column) new_max = fmaxf(new_max, at(row, column));
#pragma unroll
      for (int lane = 1; lane < kLanes; lane *= 2) new_max = fmaxf(new_max, __shfl_xor_sync(kAllLanes, new_max, lane));
      const float reference = softmax_reference(new_max);
      rescale[row] = ptx::exp2_approx(row_max[row] - reference);
      row_max[row] = new_max;
      float tile_sum = 0.0f;
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        const float weight = ptx::exp2_approx(at(row, column) - reference);
        at(row, column) = weight;
        tile_sum += weight;
      }
      lane_sum[row] = lane_sum[row] * rescale[row] + tile_sum;
    }
  }

  // Sum of the whole row.
  __device__ __forceinline__ float row_sum(int row) const {
    float sum = lane_sum[row];
#pragma unroll
    for (int lane = 1; lane < kLanes; lane *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lane);
    return sum;
  }
};

}  // namespace
}  // namespace lpd
