// The draw of sample_tokens.h: down the binary tree over token ids, five levels at a time, one node a lane.
#pragma once

#include "common/cuda.cuh"
#include "common/philox.h"
#include "token_sampling/warp_sums.cuh"

namespace lpd {
namespace {

__device__ __forceinline__ int levels_of(int vocab_size) { return 32 - __clz(vocab_size - 1); }

// Lane i returns the uniform number of the level whose halves are of 2^i ids; 0 where the tree has no such level, which
// sends the draw left, where all the weight is.
__device__ __forceinline__ float level_uniform(uint64_t seed, uint32_t cell, int vocab_size) {
  const int level = levels_of(vocab_size) - 1 - static_cast<int>(threadIdx.x) % 32;
  if (level < 0) return 0.0f;
  const PhiloxWords random = philox4x32_10(seed, cell, static_cast<uint32_t>(level / 4), PhiloxDomain::kTokens);
  const uint32_t even = level & 2 ? random.word[2] : random.word[0], odd = level & 2 ? random.word[3] : random.word[1];
  return philox_uniform(level & 1 ? odd : even);
}

// One of 2^bits items of 2^id_bits ids each, by their weights; every lane returns it. `uniform` is level_uniform's.
template <class WeightOf>
__device__ __forceinline__ int descend(int bits, int id_bits, float uniform, const WeightOf& weight_of) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int item = 0;
  while (bits > 0) {
    const int lane_bits = min(bits, 5);
    bits -= lane_bits;  // a lane now stands for 2^bits items
    float sum = 0.0f;
    if (lane < 1 << lane_bits) {
      const int mask = (1 << bits) - 1, rotation = lane >> max(5 - bits, 0);  // against bank conflicts
      for (int i = 0; i <= mask; ++i) sum += weight_of(item + (lane << bits) + ((i + rotation) & mask));
    }
    // Going up, every lane follows the draw's decision at the node above it: the one that was never refused is reached.
    bool reached = lane < 1 << lane_bits;
    for (int bit = 0; bit < lane_bits; ++bit) {
      const float other = __shfl_xor_sync(kAllLanes, sum, 1 << bit);
      const float number = __shfl_sync(kAllLanes, uniform, id_bits + bits + bit);
      const bool right = (lane >> bit & 1) != 0;
      const float left_sum = right ? other : sum;
      sum += other;
      reached = reached && (number * sum >= left_sum) == right;
    }
    item += (__ffs(__ballot_sync(kAllLanes, reached)) - 1) << bits;
  }
  return item;
}

}  // namespace
}  // namespace lpd
