// sample_tokens: guidance mix, temperature, top-k, top-p and one draw per token, without a sort.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace lpd {

// Token m mixes rows conditional_row[m] (c) and unconditional_row[m] (u) of the logits: u + guidance[m] * (c - u), or c
// alone where unconditional_row[m] is -1. Where c is -inf the mixed logit is -inf, whatever u is: a token that the
// conditional branch excludes stays excluded. Logits of +inf share all the probability. A token of weight 0
// (below e^-86 of the largest) is never drawn.
//
// The draw descends the binary tree over token ids from the top bit down. At level l it goes right if
// u_l * (left + right) >= left, with the weights left and right of the two halves, and u_l from word l % 4 of
// Philox(seed, cell, draw index l / 4, tokens).
struct SampleTokensParams {
  const void* logits;                // [Q, V] in dtype, row stride in elements
  const int32_t* conditional_row;    // [M]
  const int32_t* unconditional_row;  // [M], -1: no guidance
  const float* guidance;             // [M]
  const float* temperature;          // [M], 0: argmax, lowest id on ties
  const int32_t* top_k;              // [M], 0: off; or nullptr: off for all
  const float* top_p;                // [M], 1: off; or nullptr: off for all
  const int64_t* seed;               // [M], Philox key
  const int64_t* cell;               // [M], grid cell, Philox counter
  int64_t* tokens;                   // [M]; -1 where the mixed row has a NaN or is -inf throughout
  int64_t logits_stride;
  int64_t num_tokens;  // M
  int32_t vocab_size;  // V
  DType dtype;
};

// Tokens in the left half of the tree over `vocab_size` ids; 0 for a single token.
inline int32_t tree_half(int32_t vocab_size) {
  int32_t half = 1;
  while (half < vocab_size) half *= 2;
  return half / 2;
}

// On the current device, without waiting for it.
void launch_sample_tokens(const SampleTokensParams& params, void* stream);

}  // namespace lpd
