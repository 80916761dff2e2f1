// The CPU kernels of every operator, built once per instruction set and chosen at run time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "convolution/conv3x3.h"
#include "group_attention/group_attention.h"
#include "group_norm/group_norm_scale_shift.h"
#include "kv_cache/append_kv.h"
#include "layer_norm_folding/fold_layer_norm.h"
#include "locality_order/locality_order.h"
#include "normed_linear/normed_linear.h"
#include "packed_linear/packed_linear.h"
#include "pixel_preview/preview_pixels.h"
#include "residual_linear/residual_linear.h"
#include "residual_norm/residual_layer_norm.h"
#include "row_embedding/embed_rows.h"
#include "row_quantization/quantize_rows.h"
#include "token_sampling/sample_tokens.h"
#include "training_attention/training_attention.h"

// The calling thread does items [begin, end); callers split the work. Kernels touch nothing but what params point to.
#define LPD_FOR_EACH_CPU_KERNEL(apply)                                                                              \
  apply(group_attention, GroupAttentionParams) apply(append_kv, AppendKvParams) apply(embed_rows, EmbedRowsParams)  \
      apply(residual_layer_norm, ResidualLayerNormParams) apply(sample_tokens, SampleTokensParams)                  \
          apply(locality_order, LocalityOrderParams) apply(quantize_rows, QuantizeRowsParams)                       \
              apply(pack_linear_rows, PackedLinearParams) apply(packed_linear, PackedLinearParams)                  \
                  apply(group_norm_partials, GroupNormParams) apply(group_norm_scale_shift, GroupNormParams)        \
                      apply(conv3x3_weights, Conv3x3Params) apply(conv3x3, Conv3x3Params)                           \
                          apply(training_attention, TrainingAttentionParams)                                        \
                              apply(residual_linear, ResidualLinearParams) apply(normed_linear, NormedLinearParams) \
                                  apply(fold_layer_norm, FoldLayerNormParams)                                       \
                                      apply(preview_pixels, PreviewPixelsParams)

namespace lpd {

struct CpuKernels {
#define LPD_MEMBER(name, Params) void (*name)(const Params& params, int64_t begin, int64_t end);
  LPD_FOR_EACH_CPU_KERNEL(LPD_MEMBER)
#undef LPD_MEMBER
};

// Kernels of the instruction set in use: the best one this processor has, unless LPD_CPU_ISA or set_cpu_isa says
// otherwise.
const CpuKernels& cpu_kernels();

// "scalar", "avx2" or "avx512". set_cpu_isa throws std::invalid_argument for a name not in available_cpu_isas().
std::string cpu_isa();
std::vector<std::string> available_cpu_isas();
void set_cpu_isa(const std::string& name);

// Whether the processor has instructions that not every one with AVX-512 has. LPD_CPU_WITHOUT hides them: a test may
// set it to "vnni", "bfloat16" or both, so that what other processors run is run too.
bool cpu_has_vnni();
bool cpu_has_bfloat16();

// One table per instruction set, defined by common/cpu_table.cpp, which is compiled once for each.
#define LPD_DECLARE_KERNEL(name, Params) void name(const Params& params, int64_t begin, int64_t end);
#define LPD_DECLARE_ISA(isa)                  \
  namespace isa {                             \
  LPD_FOR_EACH_CPU_KERNEL(LPD_DECLARE_KERNEL) \
  extern const CpuKernels kCpuKernels;        \
  }
LPD_DECLARE_ISA(scalar)
LPD_DECLARE_ISA(avx2)
LPD_DECLARE_ISA(avx512)
#undef LPD_DECLARE_ISA
#undef LPD_DECLARE_KERNEL

}  // namespace lpd
