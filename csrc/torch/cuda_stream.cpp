// The function lies in libtorch_cuda, which torch's builds for CPUs lack: linking it would break `import lpd_ext`
// there. It is looked up by name at the first launch, so that one module serves both, and every torch from 2.10 on.
#include "cuda_stream.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

namespace lpd {
namespace {

using GetStream = AOTITorchError (*)(int32_t, void**);

GetStream find_function() {
  // torch has loaded it already; without RTLD_NOLOAD another copy might be found on the library path.
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr ? nullptr
                            : reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

}  // namespace

void* current_cuda_stream(int32_t device_index) {
  static const GetStream get_stream = find_function();
  STD_TORCH_CHECK(get_stream != nullptr, "CUDA tensors need a torch that was built with CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream(device_index, &stream) == 0, "torch has no current stream of CUDA device ", device_index);
  return stream;
}

}  // namespace lpd
