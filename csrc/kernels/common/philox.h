// Philox4x32-10 (Salmon et al., SC 2011): counter-based random numbers, one source for CPU and CUDA.
// key = 64-bit seed of the image; counter = (cell, draw index, 0, domain). Stateless, so a number depends on
// nothing else.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace lpd {

enum class PhiloxDomain : uint32_t { kTokens = 0, kOrders = 1 };

struct PhiloxWords {
  uint32_t word[4];
};

namespace {

LPD_HOST_DEVICE inline PhiloxWords philox4x32_10(uint64_t seed, uint32_t cell, uint32_t draw, PhiloxDomain domain) {
  uint32_t c0 = cell, c1 = draw, c2 = 0, c3 = static_cast<uint32_t>(domain);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Uniform in [0, 1) with 24 bits: exactly representable in fp32, never 1.
LPD_HOST_DEVICE inline float philox_uniform(uint32_t word) { return static_cast<float>(word >> 8) * 0x1.0p-24f; }

}  // namespace
}  // namespace lpd
