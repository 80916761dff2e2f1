#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "common/cpu_kernels.h"

namespace lpd {
namespace {

struct IsaEntry {
  const char* name;
  const CpuKernels* kernels;
  bool (*supported)();
};

// Best first.
const IsaEntry kIsas[] = {
#if defined(LPD_X86)
    {"avx512", &avx512::kCpuKernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
     }},
    {"avx2", &avx2::kCpuKernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {"scalar", &scalar::kCpuKernels, [] { return true; }},
};

const IsaEntry& find_isa(const std::string& name) {
  std::string available;
  for (const IsaEntry& isa : kIsas) {
    if (!isa.supported()) continue;
    if (name == isa.name) return isa;
    available += available.empty() ? isa.name : std::string(", ") + isa.name;
  }
  throw std::invalid_argument("CPU instruction set '" + name +
                              "' is not available; this processor and build have: " + available);
}

const IsaEntry& default_isa() {
  if (const char* name = std::getenv("LPD_CPU_ISA"); name != nullptr && *name != '\0') return find_isa(name);
  for (const IsaEntry& isa : kIsas) {
    if (isa.supported()) return isa;
  }
  return find_isa("scalar");
}

std::atomic<const IsaEntry*>& active_isa() {
  static std::atomic<const IsaEntry*> active{&default_isa()};
  return active;
}

[[maybe_unused]] bool is_hidden(const char* feature) {
  const char* hidden = std::getenv("LPD_CPU_WITHOUT");
  return hidden != nullptr && std::strstr(hidden, feature) != nullptr;
}

}  // namespace

bool cpu_has_vnni() {
#if defined(LPD_X86)
  static const bool has = __builtin_cpu_supports("avx512vnni") && !is_hidden("vnni");
  return has;
#else
  return false;
#endif
}

bool cpu_has_bfloat16() {
#if defined(LPD_X86)
  static const bool has = __builtin_cpu_supports("avx512bf16") && !is_hidden("bfloat16");
  return has;
#else
  return false;
#endif
}

const CpuKernels& cpu_kernels() { return *active_isa().load(std::memory_order_relaxed)->kernels; }

std::string cpu_isa() { return active_isa().load()->name; }

std::vector<std::string> available_cpu_isas() {
  std::vector<std::string> names;
  for (const IsaEntry& isa : kIsas) {
    if (isa.supported()) names.emplace_back(isa.name);
  }
  return names;
}

void set_cpu_isa(const std::string& name) { active_isa().store(&find_isa(name)); }

}  // namespace lpd
