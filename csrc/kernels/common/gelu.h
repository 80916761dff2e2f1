// GELU, exact form, of a vector.
#pragma once

#include "common/simd.h"

namespace lpd {
namespace {

// x * Phi(x) by erfc of Abramowitz and Stegun 7.1.26, whose error is below 1.5e-7.
inline Vec gelu(Vec x) {
  const Vec zero = broadcast(0.0f), size = max(x, zero - x);
  const Vec a = size * broadcast(0.70710678f);
  const Vec t = broadcast(1.0f) / fma(a, broadcast(0.3275911f), broadcast(1.0f));
  Vec poly = broadcast(1.061405429f);
  poly = fma(poly, t, broadcast(-1.453152027f));
  poly = fma(poly, t, broadcast(1.421413741f));
  poly = fma(poly, t, broadcast(-0.284496736f));
  poly = fma(poly, t, broadcast(0.254829592f));
  const Vec erfc = poly * t * exp_nonpositive(zero - a * a);
  const Vec half = broadcast(0.5f);
  return fma(size, half - erfc * half, x * half);
}

}  // namespace
}  // namespace lpd
