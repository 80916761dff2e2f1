// The threshold of top-k or top-p without a sort: a bracket of order keys that four pivots at a time cut into five.
// Sums are formed in one fixed order, without atomics, so every warp gets the same bits and comes to the same bracket,
// and a pass takes one barrier. Two to eight cuts for ordinary logits; at most 20, and 10 passes between them that only
// shrink the bracket.
#pragma once

#include <cmath>

#include "common/cuda.cuh"
#include "common/order_key.h"
#include "token_sampling/warp_sums.cuh"

namespace lpd {
namespace {

// Low bits of an order key that a number of type T does not need.
template <class T>
constexpr int kUnusedKeyBits = 0;
template <>
constexpr int kUnusedKeyBits<BFloat16> = 16;
template <>
constexpr int kUnusedKeyBits<Float16> = 13;

constexpr int kPivots = 4;
constexpr int kTailSums = 2 * kPivots;  // the number of logits from each pivot on, then their weights

constexpr int kEvenPasses = 6;
constexpr uint32_t kTwoPasses = (kPivots + 1) * (kPivots + 1);  // keys that two passes tell apart

// Data that the warps of a block exchange in one pass.
union Exchange {
  float sums[kMaxWarps * kTailSums];
  uint32_t keys[2 * kMaxWarps];  // least, then largest
};

// The threshold lies in [low, high): from low on there is more than enough, from high on there is not.
struct Bracket {
  uint32_t low, high;  // order keys without their unused bits
  float count_at_low, count_at_high, weight_at_low;
  int unused_bits;
  int pass;  // of this search
  int turn;  // of the two buffers, over all searches

  // From -inf on, given the number of all logits and the sum of their weights.
  __device__ Bracket(int unused_key_bits, float count, float weight)
      : low(kLowestKey >> unused_key_bits),
        count_at_low(count),
        weight_at_low(weight),
        unused_bits(unused_key_bits),
        turn(0) {}

  __device__ float logit(uint32_t key) const { return from_order_key(max(key << unused_bits, kLowestKey)); }
  __device__ float threshold() const { return logit(low); }

  // Pivot i of a pass; they ascend. The first passes cut the range of the logits evenly, which is quick for ordinary
  // ones; the others cut that of the keys, which bounds the passes for all.
  __device__ uint32_t pivot_key(int i) const {
    uint32_t key = low + __umulhi(high - low, 0x33333333u * (i + 1));
    if (pass < kEvenPasses) {
      const float top = logit(high), bottom = low == kLowestKey >> unused_bits ? top - 16.0f : logit(low);
      key = order_key(bottom + 0.2f * static_cast<float>(i + 1) * (top - bottom)) >> unused_bits;
    }
    return min(max(key, low + 1), high - 1);
  }

  // Raises low to the largest threshold that leaves more than `target`: of the logits or of their weight; row_key is
  // that of the largest logit. Ends early where a single logit is left between low and high. visit(bottom, f) calls
  // f(logit, weight) for this thread's share of the row, at least for what is not below bottom; `exchange` is shared
  // memory for two passes.
  template <class Visit>
  __device__ __forceinline__ void narrow(uint32_t row_key, bool by_weight, float target, const Visit& visit,
                                         Exchange* exchange) {
    high = (row_key >> unused_bits) + 1;
    count_at_high = 0.0f;
    pass = 0;
    while (high - low > 1 && count_at_low - count_at_high > 1.0f) {
      const float count = count_at_low - count_at_high;
      cut(by_weight, target, visit, exchange[turn]);
      turn ^= 1;
      ++pass;
      if (count_at_low - count_at_high < count || high - low <= kTwoPasses) continue;
      shrink(visit, exchange[turn]);
      turn ^= 1;
    }
  }

  // One pass: the sums at all pivots, and the bracket between two neighbours of them.
  template <class Visit>
  __device__ __forceinline__ void cut(bool by_weight, float target, const Visit& visit, Exchange& exchange) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    float pivots[kPivots], sums[kTailSums] = {};
#pragma unroll
    for (int i = 0; i < kPivots; ++i) pivots[i] = logit(pivot_key(i));
    visit(pivots[0], [&](float x, float weight) {
#pragma unroll
      for (int i = 0; i < kPivots; ++i) {
        if (x >= pivots[i]) {
          sums[i] += 1.0f;
          sums[kPivots + i] += weight;
        }
      }
    });
    const float sum = block_sums(sums, exchange.sums);

    // Sums fall from pivot to pivot, so those with enough come first.
    const uint32_t enough = __ballot_sync(kAllLanes, lane < kTailSums && sum > target);
    const int found = __popc(enough >> (by_weight ? kPivots : 0) & ((1u << kPivots) - 1));
    const float count_found = __shfl_sync(kAllLanes, sum, max(found - 1, 0));
    const float weight_found = __shfl_sync(kAllLanes, sum, kPivots + max(found - 1, 0));
    const float count_next = __shfl_sync(kAllLanes, sum, found);
    const uint32_t new_low = found > 0 ? pivot_key(found - 1) : low;
    const uint32_t new_high = found < kPivots ? pivot_key(found) : high;
    if (found > 0) {
      count_at_low = count_found;
      weight_at_low = weight_found;
    }
    if (found < kPivots) count_at_high = count_next;
    low = new_low;
    high = new_high;
  }

  // After a cut that separated none of the logits between low and high: they are close, or equal, which ends the
  // search. Moves low and high to the least and the largest of them, so the next cut does separate some.
  template <class Visit>
  __device__ __forceinline__ void shrink(const Visit& visit, Exchange& exchange) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const float bottom = logit(low), top = logit(high);  // top is NaN, and no logit as large, above +inf
    float least = INFINITY, largest = -INFINITY;
    visit(bottom, [&](float x, float) {
      if (x >= bottom && !(x >= top)) {
        least = fminf(least, x);
        largest = fmaxf(largest, x);
      }
    });
    uint32_t least_key = __reduce_min_sync(kAllLanes, order_key(least));
    uint32_t largest_key = __reduce_max_sync(kAllLanes, order_key(largest));
    if (lane == 0) {
      exchange.keys[warp] = least_key;
      exchange.keys[kMaxWarps + warp] = largest_key;
    }
    __syncthreads();
    if (lane < static_cast<int>(blockDim.x) / 32) {
      least_key = exchange.keys[lane];
      largest_key = exchange.keys[kMaxWarps + lane];
    }
    low = __reduce_min_sync(kAllLanes, least_key) >> unused_bits;
    high = (__reduce_max_sync(kAllLanes, largest_key) >> unused_bits) + 1;
  }
};

}  // namespace
}  // namespace lpd
