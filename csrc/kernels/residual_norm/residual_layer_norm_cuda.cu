// residual_layer_norm on CUDA: x += delta, then LayerNorm(x); the row stays in registers from its load to its result.
// One block per row with one thread per 8 elements, so that few rows of a small batch still use many multiprocessors.
// Limited by bandwidth for many rows, by the latency of one load, two block reductions and one store for few.
#include "common/layer_norm_row.cuh"
#include "residual_norm/residual_layer_norm.h"

namespace lpd {
namespace {

template <class T, class Slice>
__global__ void __launch_bounds__(kMaxRowThreads)
    residual_layer_norm_kernel(const ResidualLayerNormParams p, const Slice slice) {
  SMEM_ARRAY(float, shared, kLayerNormShared);
  const int64_t row = blockIdx.x;
  float* x = p.x + row * p.x_stride;

  // All that memory has to deliver is asked for before any of it is used.
  const auto weight = slice.load(static_cast<const T*>(p.weight));
  const auto bias = slice.load(static_cast<const T*>(p.bias));
  ptx::follow_launch_before();  // which wrote x and delta
  const auto loaded = slice.load(x);
  typename Slice::template Loaded<T> delta = {};
  if (p.delta != nullptr) delta = slice.load(static_cast<const T*>(p.delta) + row * p.delta_stride);

  float values[kPerThread];
  slice.template values<float>(loaded, values);
  if (p.delta != nullptr) {
    float added[kPerThread];
    slice.template values<T>(delta, added);
    for (int k = 0; k < kPerThread; ++k) values[k] += added[k];
    slice.store(x, values);
  }
  layer_norm_row<Slice, T>(slice, values, weight, bias, p.eps, shared);
  slice.store(static_cast<T*>(p.normed) + row * p.width, values);
}

template <class T>
void launch_rows(const ResidualLayerNormParams& p, void* stream) {
  constexpr int64_t kSize = sizeof(T);
  const bool aligned = rows_are_aligned(p.x, p.x_stride * 4) && rows_are_aligned(p.delta, p.delta_stride * kSize) &&
                       rows_are_aligned(p.weight, 0) && rows_are_aligned(p.bias, 0) &&
                       rows_are_aligned(p.normed, p.width * kSize);
  dispatch_row_slice("residual_layer_norm", p.width, aligned, [&](auto slice, int threads) {
    launch("residual_layer_norm", residual_layer_norm_kernel<T, decltype(slice)>,
           dim3(static_cast<unsigned>(p.num_rows)), dim3(threads), 0, stream, p, slice);
  });
}

}  // namespace

void launch_residual_layer_norm(const ResidualLayerNormParams& p, void* stream) {
  if (p.num_rows == 0 || p.width == 0) return;
  dispatch_dtype(p.dtype, [&](auto element) { launch_rows<decltype(element)>(p, stream); });
}

}  // namespace lpd
