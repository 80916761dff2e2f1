// The extension module: loading it registers the operators (schemas.cpp); what it offers itself is about the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

#include "common/cpu_kernels.h"
#include "group_attention/group_attention.h"

#if defined(LPD_WITH_CUDA)
namespace lpd {
void* create_stream();  // of common/cuda.cuh, which only CUDA sources include
}
#endif

namespace {

// A wish: pages that are huge already or cannot be are left as they are. Only whole huge pages inside the memory count.
void prefer_huge_pages([[maybe_unused]] uintptr_t address, [[maybe_unused]] uintptr_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (address + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of lpd_ext; the operators are in torch.ops.lpd_ext.";
  m.attr("__version__") = LPD_VERSION;
  m.def(
      "build_config",
      [] {
        pybind11::dict config;
        config["version"] = LPD_VERSION;
        config["compiler"] = LPD_COMPILER;
        config["torch"] = LPD_TORCH_VERSION;
        config["cuda_architectures"] = LPD_CUDA_ARCHITECTURES;
        config["cuda_compiler"] = LPD_CUDA_COMPILER;
        return config;
      },
      "How this module was built: version, compiler, torch headers, CUDA architectures and compiler ('' without CUDA "
      "kernels).");
  m.def("cpu_isa", &lpd::cpu_isa, "Instruction set whose kernels are in use: 'scalar', 'avx2' or 'avx512'.");
  m.def("available_cpu_isas", &lpd::available_cpu_isas, "Instruction sets of this processor and build, best first.");
  m.def("set_cpu_isa", &lpd::set_cpu_isa, pybind11::arg("name"),
        "Use the kernels of another instruction set from now on; ValueError if it is not available.");
  m.def(
      "cpu_features",
      [] {
        std::vector<std::string> names;
        if (lpd::cpu_has_vnni()) names.emplace_back("vnni");
        if (lpd::cpu_has_bfloat16()) names.emplace_back("bfloat16");
        return names;
      },
      "Which of 'vnni' and 'bfloat16' instructions the AVX-512 kernels use, less those that LPD_CPU_WITHOUT names.");
  m.def("prefer_huge_pages", &prefer_huge_pages, pybind11::arg("address"), pybind11::arg("bytes"),
        "Ask the system to back memory by pages of 2 MB where it is not yet; does nothing where there are none.");
#if defined(LPD_WITH_CUDA)
  m.def(
      "create_stream", [] { return reinterpret_cast<uintptr_t>(lpd::create_stream()); },
      "A cudaStream_t of the current device that nobody else has; it is never given back. In CUDA builds only.");
#endif
  m.def("group_attention_workspace_bytes", &lpd::group_attention_workspace_bytes, pybind11::arg("head_dim"),
        pybind11::arg("multiprocessors"), "Bytes of the workspace that group_attention takes on a GPU.");
}
