// Compiled once per instruction set, with LPD_ISA naming it, by the flags of the kernels.
#include "peak_loops.h"

#include "common/simd.h"

namespace lpd::bench::LPD_ISA {
namespace {

// Operands of one instruction. The baseline of x86-64 and of other processors has vectors of four, which compilers use.
#if defined(LPD_ISA_AVX512) || defined(LPD_ISA_AVX2)
using Lanes = Vec;
inline Lanes lanes(float x) { return broadcast(x); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return fma(a, b, c); }
inline float first_lane(Lanes a) { return a.v[0]; }
#else
using Lanes = float __attribute__((vector_size(16)));
inline Lanes lanes(float x) { return Lanes{x, x, x, x}; }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return a * b + c; }
inline float first_lane(Lanes a) { return a[0]; }
#endif

double fma_loop(int64_t rounds, float* values) {
  constexpr int kSums = 12;  // more than latency times throughput, few enough to stay in registers
  Lanes sum[kSums];
  for (int i = 0; i < kSums; ++i) sum[i] = lanes(values[i]);
  const Lanes factor = lanes(values[kSums]), addend = lanes(values[kSums + 1]);
  for (int64_t round = 0; round < rounds; ++round) {
    LPD_UNROLL for (int i = 0; i < kSums; ++i) sum[i] = multiply_add(sum[i], factor, addend);
  }
  for (int i = 0; i < kSums; ++i) values[i] = first_lane(sum[i]);
  return 2.0 * static_cast<double>(rounds) * kSums * (sizeof(Lanes) / sizeof(float));
}

// A multiple of 64 floats, which begin at multiples of 64 bytes.
void copy_loop(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64) {
    LPD_UNROLL for (int j = 0; j < 64; j += Vec::kWidth) store(to + i + j, load(from + i + j));
  }
}

}  // namespace

extern const PeakLoops kPeakLoops = {fma_loop, copy_loop};

}  // namespace lpd::bench::LPD_ISA
