// embed_rows on CUDA: gather two table rows, add them in registers, normalise, write x; with a scale, also x * scale
// and the statistics of every 32 columns, which four lanes have. One block per row with one thread per 8 elements, so
// that few rows of a small batch still use many multiprocessors. Limited by bandwidth for many rows; for few by
// latency: the ids, the rows they name, two block reductions, one store.
#include <cmath>
#include <type_traits>

#include "common/layer_norm_row.cuh"
#include "common/row_statistics.h"
#include "row_embedding/embed_rows.h"

namespace lpd {
namespace {

// Over the lanes that hold 32 columns of a VectorSlice.
__device__ __forceinline__ float column_sum(float value) {
  for (int lanes = 1; lanes < kStatisticsColumns / kPerThread; lanes *= 2) {
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  }
  return value;
}

// Writes what normed_linear takes of a row, as residual_linear does.
template <class T>
__device__ __forceinline__ void write_scaled(const EmbedRowsParams& p, const VectorSlice& slice, int64_t row,
                                             const float (&values)[kPerThread],
                                             const VectorSlice::Loaded<T>& loaded_scale) {
  float sum = 0.0f, squares = 0.0f, scaled[kPerThread];
  for (float value : values) sum += value;
  const float mean = column_sum(sum) * (1.0f / kStatisticsColumns);
  for (float value : values) squares += (value - mean) * (value - mean);
  squares = column_sum(squares);
  slice.template values<T>(loaded_scale, scaled);
  for (int k = 0; k < kPerThread; ++k) scaled[k] *= values[k];
  slice.store(static_cast<T*>(p.scaled) + row * p.width, scaled);
  const int column = kPerThread * static_cast<int>(threadIdx.x);
  if (column % kStatisticsColumns == 0 && slice.holds(0)) {
    store_vector(p.statistics + (row * p.width + column) / kStatisticsColumns * 2, float2{mean, squares});
  }
}

template <class T, class Slice>
__global__ void __launch_bounds__(kMaxRowThreads) embed_rows_kernel(const EmbedRowsParams p, const Slice slice) {
  SMEM_ARRAY(float, shared, kLayerNormShared);
  SMEM_ARRAY(int64_t, offsets, 2);  // of the two rows in elements, or -1 for an index outside its table
  const int64_t row = blockIdx.x;

  const auto weight = slice.load(static_cast<const T*>(p.weight));
  const auto bias = slice.load(static_cast<const T*>(p.bias));
  constexpr bool kMayScale = sizeof(T) == 2 && std::is_same_v<Slice, VectorSlice>;
  typename Slice::template Loaded<T> scale = {};
  if (kMayScale && p.scale != nullptr) scale = slice.load(static_cast<const T*>(p.scale));
  ptx::follow_launch_before();  // which wrote contents
  // One thread per index: if all warps asked, each would move the 32-byte sectors again.
  if (threadIdx.x < 2) {
    const bool is_content = threadIdx.x == 0;
    const int64_t index = is_content ? id_of(p.content_ids, p.content_index, p.num_content_ids, row)
                                     : id_of(p.positions, p.position_index, p.num_position_ids, row);
    const bool inside = index >= 0 && index < (is_content ? p.num_contents : p.num_positions);
    const int64_t stride = is_content ? p.content_stride : p.position_stride;
    store_vector(offsets + threadIdx.x, inside ? index * stride : int64_t{-1});
  }
  __syncthreads();
  const int64_t content_offset = load_vector<int64_t>(offsets), position_offset = load_vector<int64_t>(offsets + 1);

  // The host cannot look at indices without waiting for the device, so a wrong one is made visible instead: its row is
  // NaN, which is reported where tokens are sampled.
  const bool inside = content_offset >= 0 && position_offset >= 0;
  float values[kPerThread], added[kPerThread];
  const auto content = slice.load(static_cast<const T*>(p.content) + (inside ? content_offset : 0));
  const auto position = slice.load(static_cast<const T*>(p.position_embedding) + (inside ? position_offset : 0));
  slice.template values<T>(content, values);
  slice.template values<T>(position, added);
  for (int k = 0; k < kPerThread; ++k) values[k] = inside ? values[k] + added[k] : NAN;

  layer_norm_row<Slice, T>(slice, values, weight, bias, p.eps, shared);
  slice.store(p.x + row * p.width, values);
  if constexpr (kMayScale) {
    if (p.scale != nullptr) write_scaled<T>(p, slice, row, values, scale);
  }
}

template <class T>
void launch_rows(const EmbedRowsParams& p, void* stream) {
  constexpr int64_t kSize = sizeof(T);
  const bool aligned = rows_are_aligned(p.content, p.content_stride * kSize) &&
                       rows_are_aligned(p.position_embedding, p.position_stride * kSize) &&
                       rows_are_aligned(p.weight, 0) && rows_are_aligned(p.bias, 0) &&
                       rows_are_aligned(p.x, p.width * int64_t{sizeof(float)});
  dispatch_row_slice("embed_rows", p.width, aligned, [&](auto slice, int threads) {
    launch("embed_rows", embed_rows_kernel<T, decltype(slice)>, dim3(static_cast<unsigned>(p.num_rows)), dim3(threads),
           0, stream, p, slice);
  });
}

}  // namespace

void launch_embed_rows(const EmbedRowsParams& p, void* stream) {
  if (p.num_rows == 0 || p.width == 0) return;
  dispatch_dtype(p.dtype, [&](auto element) { launch_rows<decltype(element)>(p, stream); });
}

}  // namespace lpd
