// fold_layer_norm on CUDA: a warp per feature reads its weights once. Limited by bandwidth; the launches of a decode,
// which fold one layer each, overlap up to what they write.
#include "common/ptx.cuh"
#include "layer_norm_folding/fold_layer_norm.h"

namespace lpd {
namespace {

constexpr int kFoldThreads = 256;

template <class T>
__device__ __forceinline__ float dot(uint4 a, uint4 b, float sum) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  for (int i = 0; i < 4; ++i) {
    const float2 u = ptx::unpack<T>(x[i]), v = ptx::unpack<T>(y[i]);
    sum = __fmaf_rn(u.y, v.y, __fmaf_rn(u.x, v.x, sum));
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kFoldThreads) fold_layer_norm_kernel(const FoldLayerNormParams p) {
  const int lane = threadIdx.x % kWarpSize;
  const int feature = static_cast<int>(blockIdx.x * (kFoldThreads / kWarpSize) + threadIdx.x / kWarpSize);
  const bool exists = feature < p.num_features;
  const T* const weight = static_cast<const T*>(p.weight) + feature * p.weight_stride;
  float slope = 0.0f, shift = 0.0f;
#pragma unroll 2
  for (int k = 8 * lane; exists && k < p.depth; k += 8 * kWarpSize) {
    const uint4 w = load_vector<uint4>(weight + k);
    slope = dot<T>(w, load_vector<uint4>(static_cast<const T*>(p.gamma) + k), slope);
    shift = dot<T>(w, load_vector<uint4>(static_cast<const T*>(p.beta) + k), shift);
  }
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    slope += __shfl_xor_sync(kAllLanes, slope, lanes);
    shift += __shfl_xor_sync(kAllLanes, shift, lanes);
  }
  ptx::follow_launch_before();  // which may use slope and shift still
  if (lane != 0 || !exists) return;
  p.slope[feature] = slope;
  p.shift[feature] = shift + (p.bias == nullptr ? 0.0f : ptx::to_float(static_cast<const T*>(p.bias)[feature]));
}

template <class T>
void launch_for(const FoldLayerNormParams& p, void* stream) {
  constexpr int kFeatures = kFoldThreads / kWarpSize;
  launch("fold_layer_norm", fold_layer_norm_kernel<T>,
         dim3(static_cast<unsigned>((p.num_features + kFeatures - 1) / kFeatures)), dim3(kFoldThreads), 0, stream, p);
}

}  // namespace

void launch_fold_layer_norm(const FoldLayerNormParams& p, void* stream) {
  if (p.num_features == 0) return;
  dispatch_dtype16(p.dtype, [&](auto element) { launch_for<decltype(element)>(p, stream); });
}

}  // namespace lpd
