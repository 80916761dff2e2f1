// A product of matrices as the real kernels do it, with a place for each mistake such kernels invite.
#pragma once

#include "common/ptx.cuh"

namespace lpd {

enum class Mistake {
  kNone,
  kCopiesRowsPastTheEnd,
  kWaitsForTooFewGroups,
  kNoBarrierAfterWait,
  kNoBarrierBeforeRefill,
  kBarrierInOneWarp,
  kStoresRowsPastTheEnd,
  kWritesPastDynamicShared,
};

// out[m, n] = sum over k of a[m, k] b[k, n], for n < 16. Two warps of 16 rows per block; k in tiles of 16 that
// cp.async brings into two stages of shared memory; rows of 32 bytes, so there are bank conflicts.
template <Mistake kMistake>
__global__ void __launch_bounds__(64) product_kernel(const BFloat16* a,  // [rows, depth]
                                                     const BFloat16* b,  // [depth, 16]
                                                     float* out,         // [rows, 16]
                                                     int rows, int depth) {
  constexpr int kRows = 32, kTile = 16, kStage = (kRows + kTile) * kTile;
  SMEM_DYN(bytes);
  BFloat16* const stages = reinterpret_cast<BFloat16*>(bytes);  // [2, 32 rows of a and 16 of b, 16]
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int first_row = static_cast<int>(blockIdx.x) * kRows;

  const auto copy_tile = [&](int tile) {
    BFloat16* const stage = stages + tile % 2 * kStage;
    const int row = thread / 2, column = thread % 2 * 8;
    const bool valid = first_row + row < rows || kMistake == Mistake::kCopiesRowsPastTheEnd;
    const BFloat16* const source = a + int64_t{valid ? first_row + row : 0} * depth + tile * kTile + column;
    ptx::cp_async16(stage + row * kTile + column, source, valid);
    if (thread < 32) {
      ptx::cp_async16(stage + (kRows + row) * kTile + column, b + (int64_t{tile} * kTile + row) * 16 + column);
    }
  };

  float sum[2][4] = {};
  copy_tile(0);
  ptx::cp_async_commit();
  for (int tile = 0; tile < depth / kTile; ++tile) {
    if (tile + 1 < depth / kTile) copy_tile(tile + 1);
    ptx::cp_async_commit();
    ptx::cp_async_wait<kMistake == Mistake::kWaitsForTooFewGroups ? 2 : 1>();
    if (kMistake != Mistake::kNoBarrierAfterWait) __syncthreads();

    const BFloat16* const stage = stages + tile % 2 * kStage;
    uint32_t a_fragment[4], b_fragment[4];
    ptx::ldmatrix_x4(a_fragment, stage + (16 * warp + lane % 16) * kTile + lane / 16 * 8);
    ptx::ldmatrix_x4_transposed(b_fragment, stage + (kRows + lane % 16) * kTile + lane / 16 * 8);
    ptx::mma_m16n8k16<BFloat16>(sum[0], a_fragment, b_fragment[0], b_fragment[1]);
    ptx::mma_m16n8k16<BFloat16>(sum[1], a_fragment, b_fragment[2], b_fragment[3]);

    if (kMistake != Mistake::kNoBarrierBeforeRefill) __syncthreads();
    if (kMistake == Mistake::kBarrierInOneWarp && warp == 0) __syncthreads();
  }
  ptx::cp_async_wait<0>();

  for (int half = 0; half < 2; ++half) {
    const int row = first_row + 16 * warp + lane / 4 + 8 * half;
    if (row >= rows && kMistake != Mistake::kStoresRowsPastTheEnd) continue;
    for (int n = 0; n < 2; ++n) {
      store_vector(out + int64_t{row} * 16 + 8 * n + lane % 4 * 2, float2{sum[n][2 * half], sum[n][2 * half + 1]});
    }
  }
  if (kMistake == Mistake::kWritesPastDynamicShared && thread == 0) stages[2 * kStage].bits = 0;
}

}  // namespace lpd
