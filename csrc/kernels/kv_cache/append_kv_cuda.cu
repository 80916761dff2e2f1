// append_kv on CUDA: copies the context rows' K and V into the cache, each byte read once and written once.
// One block per (segment, head, 64 rows); a thread moves 16 bytes of K and 16 bytes of V at a time.
// Limited by memory bandwidth for large batches, by the latency of a load and a store for small ones.
#include "common/ptx.cuh"
#include "kv_cache/append_kv.cuh"
#include "kv_cache/append_kv.h"

namespace lpd {
namespace {

constexpr int kThreads = 128, kBlockRows = 64;

__global__ void __launch_bounds__(kThreads) append_kv_kernel(const AppendKvParams p) {
  SMEM_ARRAY(int32_t, fields, kSegmentFields);
  ptx::follow_launch_before();  // which wrote rows of K and V
  const Segment segment = read_segment(p.segments, blockIdx.x / p.num_heads, fields);
  const int first = blockIdx.y * kBlockRows;
  append_rows<kThreads>(p, segment, blockIdx.x % p.num_heads, first, min(first + kBlockRows, segment.num_context));
}

}  // namespace

void launch_append_kv(const AppendKvParams& p, void* stream) {
  if (p.num_segments == 0 || p.num_heads == 0 || p.max_rows == 0) return;
  const dim3 grid(p.num_segments * p.num_heads, (p.max_rows + kBlockRows - 1) / kBlockRows);
  launch("append_kv", append_kv_kernel, grid, dim3(kThreads), 0, stream, p);
}

}  // namespace lpd
