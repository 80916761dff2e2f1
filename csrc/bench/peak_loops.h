// The fastest this processor computes and copies, as code of each instruction set: what the benchmarks' shares refer
// to.
#pragma once

#include <cstdint>

namespace lpd::bench {

struct PeakLoops {
  // FMAs on registers alone, of 14 values; returns the floating-point operations done.
  double (*fma)(int64_t rounds, float* values);
  void (*copy)(float* to, const float* from, int64_t count);
};

// One per instruction set, defined by peak_loops.cpp, which is compiled once for each.
namespace scalar {
extern const PeakLoops kPeakLoops;
}
namespace avx2 {
extern const PeakLoops kPeakLoops;
}
namespace avx512 {
extern const PeakLoops kPeakLoops;
}

}  // namespace lpd::bench
