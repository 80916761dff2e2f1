// The stream on which torch launches kernels of a device now.
#pragma once

#include <cstdint>

namespace lpd {

// Raises an error where the torch that is loaded has no CUDA.
void* current_cuda_stream(int32_t device_index);

}  // namespace lpd
