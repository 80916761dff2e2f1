// How many accumulators the register-blocked products of the CPU kernels hold.
#pragma once

namespace lpd {

// Rows x vectors: as many as leave registers for the operands.
#if defined(LPD_ISA_AVX512)
constexpr int kBlockRows = 12, kBlockVecs = 2;
#elif defined(LPD_ISA_AVX2)
constexpr int kBlockRows = 6, kBlockVecs = 2;
#else
constexpr int kBlockRows = 4, kBlockVecs = 8;
#endif

}  // namespace lpd
