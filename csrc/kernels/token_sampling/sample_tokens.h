// sample_tokens: guidance mix, temperature, top-k, top-p and one draw per token, without a sort. sample_step: the same
// with a decode's tables, which say how to draw and take what was drawn.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"

namespace lpd {

// The tables of a decode, for sample_step; all nullptr for sample_tokens.
struct StepTables {
  const int64_t* image;        // [M], in [0, B): whose settings hold for token m
  const int64_t* token_index;  // [M], in [0, N): column of guidance
  const int64_t* write_index;  // [M], in [0, L): entry of positions, and of contents, where the token goes
  const int64_t* twin_index;   // [M], another entry of contents for it, or -1
  const int64_t* positions;    // [L], 1 + the cell
  int64_t* contents;           // [L]
  int64_t* grid;               // [B, N]
  int64_t num_images;          // B
  int64_t num_cells;           // N
  int64_t num_entries;         // L
};

// Token m mixes rows conditional_row[m] (c) and unconditional_row[m] (u) of the logits: u + guidance[m] * (c - u), or c
// alone where unconditional_row[m] is -1. Where c is -inf the mixed logit is -inf, whatever u is: a token that the
// conditional branch excludes stays excluded. Logits of +inf share all the probability. A token of weight 0
// (below e^-86 of the largest) is never drawn.
//
// The draw descends the binary tree over token ids from the top bit down. At level l it goes right if
// u_l * (left + right) >= left, with the weights left and right of the two halves, and u_l from word l % 4 of
// Philox(seed, cell, draw index l / 4, tokens).
//
// With tables, [M] of guidance, temperature, top_k, top_p and seed is [B, N] and [B], with strides, and cell is unused.
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
  int64_t* tokens;                   // [M]; -1 where nothing can be drawn; nullptr: to the tables
  StepTables tables;
  int64_t logits_stride;
  int64_t num_rows;                                                                      // Q
  int64_t guidance_stride, temperature_stride, top_k_stride, top_p_stride, seed_stride;  // 1 without tables
  int64_t num_tokens;                                                                    // M
  int32_t vocab_size;                                                                    // V
  DType dtype;
};

// How token m is drawn.
struct TokenSettings {
  int64_t image;  // or m
  float guidance, temperature;
  int32_t top_k;
  float top_p;
  uint64_t seed;
  int64_t cell;
};

LPD_HOST_DEVICE inline TokenSettings settings_of(const SampleTokensParams& p, int64_t m) {
  const StepTables& tables = p.tables;
  const bool by_image = tables.image != nullptr;
  const int64_t at = by_image ? tables.image[m] : m;
  return {at,
          p.guidance[at * p.guidance_stride + (by_image ? tables.token_index[m] : 0)],
          p.temperature[at * p.temperature_stride],
          p.top_k == nullptr ? 0 : p.top_k[at * p.top_k_stride],
          p.top_p == nullptr ? 1.0f : p.top_p[at * p.top_p_stride],
          static_cast<uint64_t>(p.seed[at * p.seed_stride]),
          by_image ? tables.positions[tables.write_index[m]] - 1 : p.cell[m]};
}

LPD_HOST_DEVICE inline void write_token(const SampleTokensParams& p, int64_t m, const TokenSettings& settings,
                                        int64_t token) {
  const StepTables& tables = p.tables;
  if (p.tokens != nullptr) {
    p.tokens[m] = token;
    return;
  }
  tables.contents[tables.write_index[m]] = token;
  if (tables.twin_index[m] >= 0) tables.contents[tables.twin_index[m]] = token;
  tables.grid[settings.image * tables.num_cells + settings.cell] = token;
}

// Whether token m's rows of logits and its entries of the tables are there: CUDA kernels look themselves, the host
// would wait for the device.
LPD_HOST_DEVICE inline bool is_inside(const SampleTokensParams& p, int64_t m, int64_t conditional_row,
                                      int64_t unconditional_row) {
  const auto within = [](int64_t value, int64_t low, int64_t end) { return value >= low && value < end; };
  if (!within(conditional_row, 0, p.num_rows) || !within(unconditional_row, -1, p.num_rows)) return false;
  const StepTables& tables = p.tables;
  if (tables.image == nullptr) return true;
  return within(tables.image[m], 0, tables.num_images) && within(tables.token_index[m], 0, tables.num_cells) &&
         within(tables.twin_index[m], -1, tables.num_entries) && within(tables.write_index[m], 0, tables.num_entries) &&
         within(tables.positions[tables.write_index[m]], 1, tables.num_cells + 1);
}

// Whether a token can be drawn with these settings. The CPU refuses others; of others CUDA kernels write token -1.
LPD_HOST_DEVICE inline bool is_usable(const TokenSettings& settings) {
  constexpr float kLargest = 3.402823466e+38f;  // comparisons with it are false for NaN
  return settings.guidance >= -kLargest && settings.guidance <= kLargest && settings.temperature >= 0.0f &&
         settings.temperature <= kLargest && settings.top_k >= 0 && settings.top_p > 0.0f && settings.top_p <= 1.0f;
}

// Tokens in the left half of the tree over `vocab_size` ids; 0 for a single token.
inline int32_t tree_half(int32_t vocab_size) {
  int32_t half = 1;
  while (half < vocab_size) half *= 2;
  return half / 2;
}

// On the current device, without waiting for it.
void launch_sample_tokens(const SampleTokensParams& params, void* stream);

}  // namespace lpd
