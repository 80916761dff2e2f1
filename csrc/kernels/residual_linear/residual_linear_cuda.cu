// residual_linear on CUDA: few_row_product.cuh, whose sums are added to x where it lies. A warp has 32 columns of 8
// rows, so statistics take three shuffles each.
#include "few_row_product/few_row_product.cuh"
#include "residual_linear/residual_linear.h"

namespace lpd {
namespace {

// Of four values in each of the eight lanes that have one row.
__device__ __forceinline__ float row_sum(float4 v) {
  float sum = (v.x + v.y) + (v.z + v.w);
  for (int lanes = 4; lanes < kWarpSize; lanes *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  return sum;
}

template <class T>
__device__ __forceinline__ float4 load_four(const void* array, int64_t at) {
  const uint2 packed = load_vector<uint2>(static_cast<const T*>(array) + at);
  const float2 low = ptx::unpack<T>(packed.x), high = ptx::unpack<T>(packed.y);
  return {low.x, low.y, high.x, high.y};
}

template <class T>
struct ResidualResult {
  struct Loaded {
    float4 x, bias, scale;
  };

  __device__ __forceinline__ Loaded load(const ProductPlace& at) const {
    Loaded loaded{};
    if (!at.exists) return loaded;
    loaded.x = load_vector<float4>(p.x + at.row * p.x_stride + at.feature);
    if (p.bias != nullptr) loaded.bias = load_four<T>(p.bias, at.feature);
    loaded.scale = load_four<T>(p.scale, at.feature);
    return loaded;
  }

  __device__ __forceinline__ void finish(const ProductPlace& at, const Loaded& loaded, float4 sum) const {
    const float4 x = add(loaded.x, add(sum, loaded.bias));
    const float mean = row_sum(x) * (1.0f / kStatisticsColumns);
    const float4 d = {x.x - mean, x.y - mean, x.z - mean, x.w - mean};
    const float squares = row_sum({d.x * d.x, d.y * d.y, d.z * d.z, d.w * d.w});
    if (!at.exists) return;
    const int64_t first = int64_t{at.row} * p.num_features;
    store_vector(p.x + at.row * p.x_stride + at.feature, x);
    store_vector(static_cast<T*>(p.scaled) + first + at.feature,
                 uint2{ptx::pack<T>(x.x * loaded.scale.x, x.y * loaded.scale.y),
                       ptx::pack<T>(x.z * loaded.scale.z, x.w * loaded.scale.w)});
    if (at.feature % kStatisticsColumns == 0) {
      store_vector(p.statistics + (first + at.feature) / kStatisticsColumns * 2, float2{mean, squares});
    }
  }

  const ResidualLinearParams& p;
};

template <class T, int kRows>
__global__ void __launch_bounds__(32 * kMaxProductWarps)
    residual_linear_kernel(const ResidualLinearParams p, const ProductPlan plan) {
  SMEM_DYN(shared);
  if (ptx::has_clusters()) {
    const ResidualResult<T> result{p};
    ProductBlock<T, kRows, ResidualResult<T>>(p, plan, shared).run(result);
  }
}

template <class T>
void launch_for(const ResidualLinearParams& p, void* stream) {
  launch_product("residual_linear", p, stream,
                 [](auto tile_rows) { return residual_linear_kernel<T, decltype(tile_rows)::value>; });
}

}  // namespace

void launch_residual_linear(const ResidualLinearParams& p, void* stream) {
  if (p.num_rows == 0 || p.num_features == 0) return;
  dispatch_dtype16(p.dtype, [&](auto element) { launch_for<decltype(element)>(p, stream); });
}

}  // namespace lpd
