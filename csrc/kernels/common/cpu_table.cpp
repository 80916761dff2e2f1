// Compiled once per instruction set, with LPD_ISA naming it.
#include "common/cpu_kernels.h"

namespace lpd::LPD_ISA {

#define LPD_ENTRY(name, Params) name,
extern const CpuKernels kCpuKernels = {LPD_FOR_EACH_CPU_KERNEL(LPD_ENTRY)};
#undef LPD_ENTRY

}  // namespace lpd::LPD_ISA
