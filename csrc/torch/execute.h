// Where an operator's kernel runs: on the CPU its items are split over torch's thread pool, on CUDA it is launched on
// the current stream. With LPD_EMULATED_OPERATORS the CUDA kernels run on CPU tensors (tests/cuda_emulation).
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "cuda_stream.h"

#if defined(LPD_EMULATED_OPERATORS)
#define LPD_OPERATOR_NAMESPACE lpd_emulated
#else
#define LPD_OPERATOR_NAMESPACE lpd_ext
#endif

// The launcher of an operator's CUDA kernel, where the build has one.
#if defined(LPD_EMULATED_OPERATORS) || defined(LPD_WITH_CUDA)
#define LPD_LAUNCHER(launcher) &lpd::launcher
#else
#define LPD_LAUNCHER(launcher) nullptr
#endif

namespace lpd::execution {

using torch::stable::Tensor;

inline bool on_cuda_kernels(const Tensor& t) {
#if defined(LPD_EMULATED_OPERATORS)
  return t.is_cpu();
#else
  return t.is_cuda();
#endif
}

// Values of CUDA tensors are not looked at: that would wait for the device.
inline bool values_readable(const Tensor& t) { return t.is_cpu(); }

// `cost` is the CPU's work for one item in roughly nanoseconds.
template <class Params>
void execute_on_cpu(const Params& params, void (*kernel)(const Params&, int64_t, int64_t), int64_t items, double cost) {
  constexpr double kMinNanosecondsPerThread = 40e3;  // less work than this does not pay for waking a thread
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(kMinNanosecondsPerThread / std::max(cost, 1.0)));
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

template <class Params, class Launcher>
void execute([[maybe_unused]] const Tensor& on, const Params& params, [[maybe_unused]] Launcher launch,
             void (*kernel)(const Params&, int64_t, int64_t), int64_t items, double cost) {
#if defined(LPD_EMULATED_OPERATORS)
  if (on_cuda_kernels(on)) return launch(params, nullptr);
#elif defined(LPD_WITH_CUDA)
  if (on_cuda_kernels(on)) {
    const auto device = on.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    return launch(params, current_cuda_stream(device));
  }
#endif
  execute_on_cpu(params, kernel, items, cost);
}

}  // namespace lpd::execution
