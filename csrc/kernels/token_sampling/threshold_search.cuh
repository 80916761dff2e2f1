// The threshold of top-k or top-p without a sort: a bracket of order keys that four pivots at a time cut into five.
// The first ones stand where logits of this mean and deviation would have the threshold, the next ones about where what
// is known of the bracket's ends says. Sums are formed in one fixed order, without atomics, so every warp gets the same
// bits and comes to the same bracket, and a pass takes one barrier. Two to five cuts for ordinary logits; at most 20,
// and 10 passes between them that only shrink the bracket.
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

constexpr int kLogitPasses = 6;                                 // that place pivots among logits, not among their keys
constexpr uint32_t kTwoPasses = (kPivots + 1) * (kPivots + 1);  // keys that two passes tell apart

// Number, sum and sum of squares of logits that are not infinite.
struct Moments {
  float count = 0.0f, sum = 0.0f, squares = 0.0f;

  __device__ __forceinline__ void add(float x) {
    const float finite = x > -INFINITY && x < INFINITY ? 1.0f : 0.0f;
    const float value = finite == 0.0f ? 0.0f : x;
    count += finite;
    sum += value;
    squares += value * value;
  }
};

// Where a normal distribution has this share above it, within 0.003.
__device__ __forceinline__ float normal_quantile(float share_above) {
  const float t = sqrtf(-2.0f * __logf(fminf(share_above, 1.0f - share_above)));
  const float z = t - __fdividef(2.30753f + 0.27061f * t, 1.0f + (0.99229f + 0.04481f * t) * t);
  return share_above < 0.5f ? z : -z;
}

// Where the threshold is expected, or nowhere, if that is not a number; how far logits lie apart, and over what
// distance sums fall about evenly.
struct Expected {
  float logit, deviation, straight;

  // Of the logits themselves, of which a share lies above; with weights exp(x / temperature) a share of the weight,
  // which is distributed as logits around a mean that is larger by deviation^2 / temperature.
  __device__ Expected(const Moments& moments, float share_above, float inverse_temperature) {
    const float mean = moments.sum / moments.count;
    deviation = sqrtf(moments.squares / moments.count - mean * mean);
    straight = inverse_temperature > 0.0f ? 1.0f / inverse_temperature : 0.5f * deviation;
    // Further up a few logits have all the weight.
    const bool is_known = deviation * inverse_temperature < 2.5f && deviation > 0.0f;
    logit = is_known ? mean + deviation * (deviation * inverse_temperature + normal_quantile(share_above)) : NAN;
  }
};

// Data that the warps of a block exchange in one pass.
union Exchange {
  float sums[kMaxWarps * kTailSums];
  uint32_t keys[2 * kMaxWarps];  // least, then largest
};

// The threshold lies in [low, high): from low on there is more than enough, from high on there is not.
struct Bracket {
  uint32_t low, high;                                                // order keys without their unused bits
  float count_at_low, count_at_high, weight_at_low, weight_at_high;  // weights, where the search is by weight
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

  // Pivot i of a pass; they ascend. In the first passes they stand where the threshold is expected, two on each side:
  // by the distribution, then by how much of what lies between low and high is above the threshold; or evenly, where
  // little is known or left. In the others they cut the keys evenly, which bounds the passes for all.
  __device__ uint32_t pivot_key(int i, bool by_weight, float target, const Expected& expected) const {
    uint32_t key = low + __umulhi(high - low, 0x33333333u * (i + 1));
    if (pass < kLogitPasses) {
      const bool from_lowest = low == kLowestKey >> unused_bits;
      const float top = logit(high), bottom = from_lowest ? top - 16.0f : logit(low);
      const float inside = count_at_low - count_at_high, apart = i == 0 ? -4.0f : i == 1 ? -1.0f : i == 2 ? 1.0f : 4.0f;
      float at = 0.2f * static_cast<float>(i + 1);
      if (!from_lowest && inside > 16.0f && top - bottom < expected.straight) {
        const float below = by_weight ? weight_at_low - target : count_at_low - target;
        at = below / (by_weight ? weight_at_low - weight_at_high : inside) + 0.3f * apart * rsqrtf(inside);
      }
      float x = bottom + fminf(fmaxf(at, 0.0f), 1.0f) * (top - bottom);
      if (pass == 0 && expected.logit == expected.logit) {
        x = expected.logit + 0.025f * apart * fabsf(apart) * expected.deviation;
      }
      key = order_key(x) >> unused_bits;
    }
    return min(max(key, low + 1), high - 1);
  }

  // Raises low to the largest threshold that leaves more than `target`: of the logits or of their weight; row_key is
  // that of the largest logit. Ends early where a single logit is left between low and high. visit(bottom, by_weight,
  // f) calls f(logit, weight) for this thread's share of the row, at least for what is not below bottom; `exchange` is
  // shared memory for two passes.
  template <class Visit>
  __device__ __forceinline__ void narrow(uint32_t row_key, bool by_weight, float target, const Expected& expected,
                                         const Visit& visit, Exchange* exchange) {
    high = (row_key >> unused_bits) + 1;
    count_at_high = weight_at_high = 0.0f;
    pass = 0;
    while (high - low > 1 && count_at_low - count_at_high > 1.0f) {
      const float count = count_at_low - count_at_high;
      cut(by_weight, target, expected, visit, exchange[turn]);
      turn ^= 1;
      ++pass;
      if (count_at_low - count_at_high < count || high - low <= kTwoPasses) continue;
      shrink(visit, exchange[turn]);
      turn ^= 1;
    }
  }

  // One pass: the sums at all pivots, and the bracket between two neighbours of them.
  template <class Visit>
  __device__ __forceinline__ void cut(bool by_weight, float target, const Expected& expected, const Visit& visit,
                                      Exchange& exchange) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const uint32_t pivot = pivot_key(lane % kPivots, by_weight, target, expected);  // of this lane
    float pivots[kPivots], sums[kTailSums] = {};
#pragma unroll
    for (int i = 0; i < kPivots; ++i) pivots[i] = logit(__shfl_sync(kAllLanes, pivot, i));
    visit(pivots[0], by_weight, [&](float x, float weight) {
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
    const int last = max(found - 1, 0), next = min(found, kPivots - 1);
    const float count_found = __shfl_sync(kAllLanes, sum, last), count_next = __shfl_sync(kAllLanes, sum, next);
    const float weight_found = __shfl_sync(kAllLanes, sum, kPivots + last);
    const float weight_next = __shfl_sync(kAllLanes, sum, kPivots + next);
    const uint32_t new_low = __shfl_sync(kAllLanes, pivot, last), new_high = __shfl_sync(kAllLanes, pivot, next);
    if (found > 0) {
      low = new_low;
      count_at_low = count_found;
      weight_at_low = weight_found;
    }
    if (found < kPivots) {
      high = new_high;
      count_at_high = count_next;
      weight_at_high = weight_next;
    }
  }

  // After a cut that separated none of the logits between low and high: they are close, or equal, which ends the
  // search. Moves low and high to the least and the largest of them, so the next cut does separate some.
  template <class Visit>
  __device__ __forceinline__ void shrink(const Visit& visit, Exchange& exchange) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const float bottom = logit(low), top = logit(high);  // top is NaN, and no logit as large, above +inf
    float least = INFINITY, largest = -INFINITY;
    visit(bottom, false, [&](float x, float) {
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
