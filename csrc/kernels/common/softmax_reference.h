// The reference that is subtracted from a row's scores in an online softmax: one source for CPU and CUDA.
#pragma once

#include "common/host_device.h"

namespace lpd {
namespace {

constexpr float kMinusInfinity = -__builtin_huge_valf();

// The largest score so far, or 0 where all are -inf: -inf - -inf would be NaN.
LPD_HOST_DEVICE inline float softmax_reference(float row_max) { return row_max == kMinusInfinity ? 0.0f : row_max; }

}  // namespace
}  // namespace lpd
