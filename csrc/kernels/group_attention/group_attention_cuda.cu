// group_attention on CUDA: appends this step's context K and V and attends, context and query rows alike, in one pass.
// One block of 4 warps per (segment, head, 64 rows) and share of the keys; warps share out its rows, or, where rows are
// few, keys. Where that leaves multiprocessors idle, blocks share the keys: as a cluster from 9.0 on, which combines
// through shared memory; before, through global memory, where the last one to arrive combines.
// Limited by memory bandwidth for large batches (30 FLOPs per byte), by latency for one image.
#include <stdexcept>
#include <string>

#include "group_attention/cluster_exchange.cuh"
#include "group_attention/fma_warp.cuh"
#include "group_attention/keys_ahead.cuh"
#include "group_attention/tensor_core_warp.cuh"

namespace lpd {
namespace {

template <class T, int kHeadDim, int kKeyWarps>
struct WarpOf {
  using Type = TensorCoreWarp<T, kHeadDim, kKeyWarps>;
};
template <int kHeadDim, int kKeyWarps>
struct WarpOf<float, kHeadDim, kKeyWarps> {
  using Type = FmaWarp<float, kHeadDim, kKeyWarps>;
};

template <class T, int kHeadDim>
struct SharedLayout {
  using Shape = TileShape<T, kHeadDim>;
  static constexpr int kScratchOffset = Shape::kRingElements * sizeof(T);
  static constexpr int kFieldsOffset = kScratchOffset + WarpOf<T, kHeadDim, 1>::Type::kScratchBytes;
  static constexpr int kBarrierOffset = kFieldsOffset + kSegmentFields * 4;
  // In registers it would leave room for three blocks of head dimension 64 on a multiprocessor, not four.
  static constexpr int kWorkOffset = kBarrierOffset + 8;
  static constexpr int kBytes = kWorkOffset + (sizeof(BlockWork) + 15) / 16 * 16;  // of a block that forms no cluster
  static_assert(kBytes % 16 == 0);
  static_assert(Partial<kHeadDim>::kElements * 4 <= kScratchOffset);
};

// Walks over the keys of this block's split, of which kKeyWarps warps share every tile, and writes what its rows make
// of them: to the output if all keys were seen, else to a partial.
template <class T, int kHeadDim, int kKeyWarps>
__device__ __forceinline__ void attend(const GroupAttentionParams& p, const KeySplits& splits, const BlockWork& work,
                                       unsigned char* smem) {
  using Layout = SharedLayout<T, kHeadDim>;
  using Warp = typename WarpOf<T, kHeadDim, kKeyWarps>::Type;
  constexpr int kRowWarps = kWarps / kKeyWarps;
  constexpr float kLog2E = 1.4426950408889634f;

  T* const elements = reinterpret_cast<T*>(smem);
  KeyRing<T, kHeadDim> ring(p, work, elements);
  ask_for_keys_of_next<T, kHeadDim>(p, splits.blocks_at_once, Layout::Shape::kKeys);
  const unsigned warp_index =
      __shfl_sync(kAllLanes, threadIdx.x / 32, 0);  // so the compiler knows that it is the warp's
  const int slab_in_tile = warp_index % kRowWarps, key_warp = warp_index / kRowWarps;
  const bool active = slab_in_tile < work.num_slabs;
  const Slab slab = work.slab(slab_in_tile);
  Warp warp(work, slab.key_end, slab_in_tile, key_warp, p.scale * kLog2E, elements, smem + Layout::kScratchOffset);
  // Without keys there is no next(), and partials come to lie where Q arrives.
  if (Warp::kQueriesInRegisters || work.num_tiles == 0) ring.wait_for_queries();
  if (active) warp.take_queries();

  for (int tile = 0; tile < work.num_tiles; ++tile) {
    const int first_key = work.first_key + tile * Layout::Shape::kKeys;
    const int keys = ring.next();
    if (active) warp.score(keys, first_key);
    const int values = ring.next();
    if (active) warp.add_values(values, first_key);
  }

  const bool in_shared = kKeyWarps > 1 || work.in_cluster();
  if (in_shared) __syncthreads();  // partials may lie where other warps still read V
  if (!active) return;
  if (work.num_splits > 1 && !work.in_cluster()) {
    warp.write_partial(split_partial<kHeadDim>(splits, work, work.split), warp_index, slab.count);
  } else if (in_shared) {
    warp.write_partial(Partial<kHeadDim>{reinterpret_cast<float*>(smem)}, warp_index, slab.count);
  } else {
    const int64_t row_stride = int64_t{p.num_heads} * kHeadDim;
    T* output = static_cast<T*>(p.output) + (slab.first - p.first_output_row) * row_stride + work.head * kHeadDim;
    warp.write(output, row_stride, slab.count, ring.free_slot());
  }
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, TileShape<T, kHeadDim>::kBlocks)
    group_attention_kernel(const GroupAttentionParams p, const KeySplits splits) {
  using Layout = SharedLayout<T, kHeadDim>;
  SMEM_DYN(smem);
  if (!p.settled) ptx::follow_launch_before();  // which wrote Q, K and V
  const Segment segment =
      read_segment(p.segments, blockIdx.x / p.num_heads, reinterpret_cast<int32_t*>(smem + Layout::kFieldsOffset));
  BlockWork& work = *reinterpret_cast<BlockWork*>(smem + Layout::kWorkOffset);
  if (threadIdx.x == 0) work = BlockWork(p, splits, segment, Layout::Shape::kKeys);
  __syncthreads();  // work is made
  if (work.num_slabs == 0) {
    if (p.settled) ptx::follow_launch_before();  // which wrote rows to append
    if (work.row_tile == 0 && work.split == 0) {
      append_rows<kThreads>(p, segment, work.head, 0, segment.num_context);
    }
    return;
  }
  if (work.split >= work.num_splits) return;  // before 9.0 alone
  const ClusterExchange<T, kHeadDim> exchange(work, reinterpret_cast<uint64_t*>(smem + Layout::kBarrierOffset),
                                              reinterpret_cast<float*>(smem + Layout::kBytes));
  if (work.in_cluster()) exchange.begin();
  switch (work.key_warps()) {
    case 4: attend<T, kHeadDim, 4>(p, splits, work, smem); break;
    case 2: attend<T, kHeadDim, 2>(p, splits, work, smem); break;
    default: attend<T, kHeadDim, 1>(p, splits, work, smem);
  }

  const Partial<kHeadDim> own{reinterpret_cast<float*>(smem)};
  if (work.in_cluster()) {
    __syncthreads();  // all partials are written
    exchange.push(own);
    exchange.finish(p);
  } else if (work.num_splits > 1) {
    if (arrive_last(splits.counters + tile_index(splits, work), work.num_splits)) {
      const auto partial_of = [&](int block) { return split_partial<kHeadDim>(splits, work, block); };
      combine<T, kHeadDim>(p, work, work.num_splits, partial_of);
    }
  } else if (work.key_warps() > 1) {
    __syncthreads();
    combine<T, kHeadDim>(p, work, 1, [&](int) { return own; });
  }
}

template <class T, int kHeadDim>
void launch_for(const GroupAttentionParams& p, void* stream) {
  const auto kernel = group_attention_kernel<T, kHeadDim>;
  const bool clusters = can_form_clusters(kernel);
  const int32_t multiprocessors = multiprocessor_count();
  const int64_t heads = int64_t{p.num_segments} * p.num_heads, row_tiles = group_attention_row_tiles(p.max_rows);
  int32_t count = p.workspace == nullptr ? 1 : group_attention_key_splits(p, multiprocessors, clusters);
  const int64_t counter_bytes = group_attention_counter_bytes(multiprocessors);
  const int64_t partial_bytes = heads * row_tiles * count * group_attention_partial_bytes(kHeadDim);
  if (!clusters && counter_bytes + partial_bytes > p.workspace_bytes) count = 1;
  const auto shared_bytes = [&] {
    return static_cast<size_t>(SharedLayout<T, kHeadDim>::kBytes +
                               (clusters && count > 1 ? received_bytes<kHeadDim>(count) : 0));
  };
  if (shared_bytes() > shared_memory_limit()) count = 1;
  const unsigned cluster = clusters ? count : 1;
  // Each class may leave all but one row of a slab empty.
  const int64_t slabs = (int64_t{p.max_rows} + 2 * (kSlabRows - 1)) / kSlabRows;
  const int64_t all_tiles = (slabs + kWarps - 1) / kWarps, split_tiles = cluster > 1 ? all_tiles : row_tiles;
  char* counters = static_cast<char*>(p.workspace);
  const int64_t at_once = int64_t{TileShape<T, kHeadDim>::kBlocks} * multiprocessors;
  const bool in_turns = clusters && count == 1 && heads > at_once;
  const KeySplits splits{count, static_cast<int>(split_tiles), reinterpret_cast<unsigned*>(counters),
                         reinterpret_cast<float*>(counters + counter_bytes), in_turns ? static_cast<int>(at_once) : 0};
  const int64_t blocks_per_head = split_tiles * count + all_tiles - split_tiles;
  const dim3 blocks(static_cast<unsigned>(heads), static_cast<unsigned>(blocks_per_head));
  launch("group_attention", kernel, Grid(blocks, dim3(1, cluster)), dim3(kThreads), shared_bytes(), stream, p, splits);
}

template <class T>
void launch_for_type(const GroupAttentionParams& p, void* stream) {
  switch (p.head_dim) {
    case 32: return launch_for<T, 32>(p, stream);
    case 64: return launch_for<T, 64>(p, stream);
    case 128: return launch_for<T, 128>(p, stream);
    default:
      throw std::runtime_error("group_attention: no CUDA kernel for head dimension " + std::to_string(p.head_dim));
  }
}

}  // namespace

void launch_group_attention(const GroupAttentionParams& p, void* stream) {
  if (p.num_segments == 0 || p.num_heads == 0 || p.max_rows == 0) return;
  dispatch_dtype(p.dtype, [&](auto element) { launch_for_type<decltype(element)>(p, stream); });
}

}  // namespace lpd
