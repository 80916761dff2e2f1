// group_norm_scale_shift: what GroupNorm multiplies by and adds, per image and channel, for whoever applies it. CPU
// only.
#pragma once

#include <cstdint>

namespace lpd {

// All arrays contiguous.
struct GroupNormParams {
  const float* x;       // [B, P, C], P = H * W pixels
  const float* weight;  // [C]
  const float* bias;    // [C]
  float* partials;      // [B, chunks, 2, C]: mean and sum of centred squares of a chunk's pixels
  float* scale_shift;   // [B, 2, C]: GroupNorm(x) = x * scale + shift
  int64_t batch;
  int64_t pixels;
  int32_t channels;
  int32_t groups;
  float eps;
};

// Pixels of one chunk: at C = 128 they fill 64 KB, which stays in L2 between the two passes.
constexpr int64_t kGroupNormChunk = 128;

namespace {  // internal linkage: units built for different instruction sets must not share code

inline int64_t group_norm_chunks(const GroupNormParams& p) {
  return (p.pixels + kGroupNormChunk - 1) / kGroupNormChunk;
}

}  // namespace

}  // namespace lpd
