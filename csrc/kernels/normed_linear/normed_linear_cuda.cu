// normed_linear on CUDA: few_row_product.cuh, whose sums become results without leaving registers. The statistics of a
// row are merged by the eight lanes that have it, before the sums have come.
#include "few_row_product/few_row_product.cuh"
#include "normed_linear/normed_linear.h"

namespace lpd {
namespace {

// Over the eight lanes that have one row.
__device__ __forceinline__ float row_sum(float value) {
  for (int lanes = 4; lanes < kWarpSize; lanes *= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * erfcf(-0.70710678118654752f * x); }

template <class T>
struct NormedResult {
  struct Loaded {
    float mean, inverse_deviation;
    float4 slope, shift;
  };

  __device__ __forceinline__ Loaded load(const ProductPlace& at) const {
    const int groups = p.depth / 32, first = static_cast<int>(threadIdx.x) % kWarpSize / 4;
    const float* const statistics = p.statistics + int64_t{at.row} * groups * 2;
    const auto of = [&](int group) { return load_vector<float2>(statistics + group * 2); };
    const int end = at.row < p.num_rows ? groups : 0;  // also for lanes whose features do not exist
    float means = 0.0f, squares = 0.0f;
    for (int group = first; group < end; group += 8) means += of(group).x;
    const float mean = row_sum(means) / static_cast<float>(groups);
    for (int group = first; group < end; group += 8) {
      const float2 part = of(group);
      const float distance = part.x - mean;
      squares += part.y + 32.0f * (distance * distance);
    }
    const float variance = row_sum(squares) / static_cast<float>(p.depth);
    Loaded loaded{mean, rsqrtf(variance + p.eps), {}, {}};
    if (at.exists) {
      loaded.slope = load_vector<float4>(p.slope + at.feature);
      loaded.shift = load_vector<float4>(p.shift + at.feature);
    }
    return loaded;
  }

  __device__ __forceinline__ void finish(const ProductPlace& at, const Loaded& loaded, float4 sum) const {
    if (!at.exists) return;
    const auto value = [&](float product, float slope, float shift) {
      const float y = __fmaf_rn(__fmaf_rn(-loaded.mean, slope, product), loaded.inverse_deviation, shift);
      return p.gelu ? gelu(y) : y;
    };
    const float4 a = loaded.slope, b = loaded.shift;
    store_vector(static_cast<T*>(p.output) + int64_t{at.row} * p.num_features + at.feature,
                 uint2{ptx::pack<T>(value(sum.x, a.x, b.x), value(sum.y, a.y, b.y)),
                       ptx::pack<T>(value(sum.z, a.z, b.z), value(sum.w, a.w, b.w))});
  }

  const NormedLinearParams& p;
};

template <class T, int kRows>
__global__ void __launch_bounds__(32 * kMaxProductWarps, 1)
    normed_linear_kernel(const NormedLinearParams p, const ProductPlan plan) {
  SMEM_DYN(shared);
  if (ptx::has_clusters()) {
    const NormedResult<T> result{p};
    ProductBlock<T, kRows, NormedResult<T>>(p, plan, shared).run(result);
  }
}

template <class T>
void launch_for(const NormedLinearParams& p, void* stream) {
  launch_product("normed_linear", p, stream,
                 [](auto tile_rows) { return normed_linear_kernel<T, decltype(tile_rows)::value>; });
}

}  // namespace

void launch_normed_linear(const NormedLinearParams& p, void* stream) {
  if (p.num_rows == 0 || p.num_features == 0) return;
  dispatch_dtype16(p.dtype, [&](auto element) { launch_for<decltype(element)>(p, stream); });
}

}  // namespace lpd
