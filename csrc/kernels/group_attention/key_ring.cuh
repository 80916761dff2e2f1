// Q, K and V of a block on their way through shared memory: a ring of slots, each for the K or the V of one tile of
// keys, filled by cp.async while earlier ones are in use. K and V of earlier steps may come while the launch before
// still runs.
#pragma once

#include "common/ptx.cuh"
#include "group_attention/block_work.cuh"

namespace lpd {
namespace {

// Sizes that follow from element type and head dimension.
template <class T, int kHeadDim>
struct TileShape {
  static constexpr bool kTensorCores = sizeof(T) == 2;
  static constexpr int kKeys = kTensorCores ? 64 : 32;
  static constexpr int kSlots = kTensorCores ? 4 : 3;
  static constexpr int kBlocks = kHeadDim > 64 ? 2 : kTensorCores ? 4 : 3;  // per multiprocessor, for their registers
  static constexpr int kChunk = 16 / sizeof(T);                             // elements of 16 bytes
  static constexpr int kChunks = kHeadDim / kChunk;                         // of a row
  static constexpr int kSlotElements = kKeys * kHeadDim;
  static constexpr int kQueryElements = kTileRows * kHeadDim;
  // Tensor-core warps take Q into registers before the last slot is filled, so Q lies there.
  static constexpr int kQueryOffset = (kTensorCores ? kSlots - 1 : kSlots) * kSlotElements;
  static constexpr int kRingElements = kQueryOffset + kQueryElements;
  static_assert(!kTensorCores || kQueryElements == kSlotElements);

  // Where 16 bytes of a row lie. The xor puts the same chunk of the 8 rows that are accessed together into different
  // banks: rows n + const in 16 bits, in fp32 rows i * n + const, where i is 1, 2 or 4 keys per lane.
  static __device__ __forceinline__ int at(int row, int chunk) {
    const int swizzle = kChunks == 4 ? (row >> 1) & 3 : kTensorCores ? row & 7 : (row ^ (row >> 3)) & 7;
    return row * kHeadDim + (chunk ^ swizzle) * kChunk;
  }
};

template <class T, int kHeadDim>
class KeyRing {
 public:
  using Shape = TileShape<T, kHeadDim>;

  __device__ __forceinline__ KeyRing(const GroupAttentionParams& p, const BlockWork& work, T* ring)
      : p_(p),
        work_(work),
        ring_(ring),
        qkv_(static_cast<const T*>(p.qkv) + work.head * p.qkv_head_stride),
        cached_(cache_offset(p, work.segment, work.head)) {
    static_assert(kThreads % Shape::kChunks == 0);
#pragma unroll 1
    for (int half = 0; half < Shape::kSlots - 1; ++half) copy_keys(half, true, !p.settled);
    if (p.settled) ptx::follow_launch_before();  // which wrote rows
    load_queries(rows(0));
#pragma unroll 1
    for (int half = 0; half < Shape::kSlots - 1; ++half) {
      if (p.settled) copy_keys(half, false, true);
      ptx::cp_async_commit();
    }
  }

  // Q arrives together with the first K.
  __device__ __forceinline__ void wait_for_queries() {
    ptx::cp_async_wait<Shape::kSlots - 2>();
    __syncthreads();
  }

  // Waits for the next half (K of a tile, then its V), and has the slot of the one before it, which all warps have
  // left now, filled again.
  __device__ __forceinline__ int next() {
    ptx::cp_async_wait<Shape::kSlots - 2>();
    __syncthreads();
    copy_keys(half_ + Shape::kSlots - 1, true, true);
    ptx::cp_async_commit();  // an empty group after the last half keeps the count of groups in flight
    const int arrived = slot(half_);
    if (work_.first_slab == 0) append(arrived, half_);
    ++half_;
    return arrived;
  }

  // A slot that nobody uses any more after the last next().
  __device__ __forceinline__ T* free_slot() const { return ring_ + slot(half_ - 2); }

 private:
  static __device__ __forceinline__ int slot(int half) { return half % Shape::kSlots * Shape::kSlotElements; }

  // Row 0 of Q, K or V of this step.
  __device__ __forceinline__ const T* rows(int part) const { return qkv_ + part * p_.qkv_part_stride; }

  // Position 0 of K or V.
  __device__ __forceinline__ T* cache(int half) const {
    return static_cast<T*>(half == 0 ? p_.k_cache : p_.v_cache) + cached_;
  }

  __device__ __forceinline__ void load_queries(const T* rows) {
    T* to = ring_ + Shape::kQueryOffset;
#pragma unroll 1
    for (int row = row_; row < work_.num_slabs * kSlabRows; row += kRowStep) {
      const Slab slab = work_.slab(row / kSlabRows);
      const int in_slab = row % kSlabRows;
      const bool exists = in_slab < slab.count;
      const T* from = exists ? rows + (slab.first + in_slab) * p_.qkv_row_stride : rows;
      ptx::cp_async16(to + Shape::at(row, chunk_), from + chunk_ * Shape::kChunk, exists);
    }
  }

  // Starts the copy of a half, or of its keys that are cached, or of the others.
  __device__ __forceinline__ void copy_keys(int half, bool cached, bool others) {
    if (half >= 2 * work_.num_tiles) return;
    const int first_key = work_.first_key + half / 2 * Shape::kKeys;
    const T* cache = this->cache(half % 2) + chunk_ * Shape::kChunk;
    T* to = ring_ + slot(half);
    if (first_key + Shape::kKeys <= work_.segment.cache_length) {  // as most tiles are
      if (!cached) return;
      const T* from = cache + (first_key + row_) * p_.cache_position_stride;
#pragma unroll
      for (int row = 0; row < Shape::kKeys; row += kRowStep) {
        ptx::cp_async16(to + Shape::at(row_ + row, chunk_), from);
        from += kRowStep * p_.cache_position_stride;
      }
      return;
    }
    const T* rows = this->rows(1 + half % 2) + chunk_ * Shape::kChunk;
#pragma unroll 1
    for (int row = row_; row < Shape::kKeys; row += kRowStep) {
      const int key = first_key + row;
      const bool is_cached = key < work_.segment.cache_length;
      if (is_cached ? !cached : !others) continue;
      const T* from = cache + key * p_.cache_position_stride;
      if (!is_cached) {
        const int in_qkv = key < work_.shared_keys ? work_.segment.context_start + key - work_.segment.cache_length
                                                   : work_.segment.query_start + key - work_.query_keys;
        from = rows + in_qkv * p_.qkv_row_stride;
      }
      const bool exists = work_.key_exists(key);
      ptx::cp_async16(to + Shape::at(row, chunk_), exists ? from : rows, exists);
    }
  }

  // Context rows of the half go on into the cache. Their keys are numbered as cache positions are.
  __device__ __forceinline__ void append(int arrived, int half) {
    const int first_key = work_.first_key + half / 2 * Shape::kKeys;
    const int begin = max(work_.segment.cache_length - first_key, 0);
    const int end = min(work_.shared_keys - first_key, Shape::kKeys);
    T* cache = this->cache(half % 2) + chunk_ * Shape::kChunk;
#pragma unroll 1
    for (int row = begin + row_; row < end; row += kRowStep) {
      store_vector(cache + (first_key + row) * p_.cache_position_stride,
                   load_vector<uint4>(ring_ + arrived + Shape::at(row, chunk_)));
    }
  }

  // Row and chunk of the 16 bytes that this thread moves, in steps of kRowStep rows.
  static constexpr int kRowStep = kThreads / Shape::kChunks;
  const int row_ = threadIdx.x / Shape::kChunks;
  const int chunk_ = threadIdx.x % Shape::kChunks;

  const GroupAttentionParams& p_;
  const BlockWork& work_;
  T* const ring_;
  const T* const qkv_;    // row 0 of this head's Q
  const int64_t cached_;  // from a cache's start to this head's position 0
  int half_ = 0;          // that next() waits for: 2 * tile, + 1 for V
};

}  // namespace
}  // namespace lpd
