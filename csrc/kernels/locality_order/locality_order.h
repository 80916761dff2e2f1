// locality_order: the locality-aware generation order of LPD (arXiv 2507.01957, section 3.3), one order per image.
#pragma once

#include <cstdint>

namespace lpd {

constexpr int kProximityRanks = 25;  // of 0 to 4 neighbours by an edge and 0 to 4 by a corner

// Words of the Philox output of (cell, step).
constexpr int kTieWord = 0;    // orders cells of equal proximity
constexpr int kStartWord = 1;  // picks a uniformly random cell

struct LocalityOrderParams {
  const int32_t* group_sizes;  // [T] or [B, T], zero padded at the end
  const int64_t* seeds;        // [B], Philox key
  const uint8_t* known;        // [B, N] nonzero: cell is already drawn; or nullptr
  int64_t* order;              // [B, N]: free cells in decoding order, then -1
  int64_t group_sizes_stride;  // 0 when all images share one schedule
  int32_t batch;
  int32_t steps;  // T
  int32_t height;
  int32_t width;
  int32_t repulsion_threshold;
  // Proximity of a cell with e edge and c corner neighbours drawn is e + c / sqrt(2). Only comparisons matter, so the
  // host ranks the 25 values once: integers on the device, equal results everywhere.
  uint8_t proximity_rank[5][5];  // [edges][corners], larger is closer
  bool is_near[5][5];            // proximity >= proximity_threshold
};

// Fills proximity_rank and is_near.
void set_proximity_threshold(LocalityOrderParams& params, double proximity_threshold);

// Shared memory of a block of the CUDA kernel: a score, two bytes of the order and a bit per cell, beside tables.
// 32 x 32 cells need 7 KB; 128 x 128 need 101,128 bytes, which every GPU has (99 KB = 101,376 on sm_86, 89 and 120).
inline int64_t locality_order_shared_bytes(int64_t height, int64_t width) {
  const int64_t cells = height * width, words = (cells + 31) / 32;
  return 2 * 32 * 8 + 2 * 32 * 4 + (cells + 3) / 4 * 16 + (words + 2) * 4 + cells * 2;
}

// On CUDA, asynchronously on a cudaStream_t. Throws if the GPU has less than locality_order_shared_bytes per block.
void launch_locality_order(const LocalityOrderParams& params, void* stream);

}  // namespace lpd
