// Integers in the order of the floats, for searches of a threshold: one source for CPU and CUDA.
#pragma once

#include "common/dtype.h"

namespace lpd {
namespace {

constexpr uint32_t kLowestKey = 0x007fffffu;  // order_key(-inf)

// Adding 0 turns -0 into +0, its equal.
LPD_HOST_DEVICE inline uint32_t order_key(float x) {
  const uint32_t bits = float_to_bits(x + 0.0f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

LPD_HOST_DEVICE inline float from_order_key(uint32_t key) {
  return bits_to_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

}  // namespace
}  // namespace lpd
