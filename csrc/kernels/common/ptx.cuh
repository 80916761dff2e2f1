// Instructions that CUDA C++ has no expression for: asynchronous copies, clusters of blocks, matrix fragments,
// tensor-core products, packed conversions. Fragment layouts are those of the PTX manual, "Matrix Fragments for
// mma.m16n8k16".
#pragma once

#include "common/cuda.cuh"
#include "common/dtype.h"

#ifdef LPD_CUDA_EMULATED
#include "emulated_ptx.h"
#else

namespace lpd::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes from global to shared memory behind the threads' back, past L1; zeros, reading nothing, if !valid.
// Done once cp_async_wait says so; the target must not be touched in between.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid = true) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most kGroups of this thread's groups are under way. Other threads see the data after a barrier.
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroups) : "memory");
}

// Asks L2 for the line of 128 bytes that holds this address of global memory, and waits for nothing.
__device__ __forceinline__ void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(global));
}

// From 9.0 on, where a launch may begin before the one before it has ended: waits for that, and for all that it wrote.
__device__ __forceinline__ void wait_for_launch_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#else
  __trap();
#endif
}

// Lets the launch after begin, if it may begin early, once all blocks have come here; after the wait, because what that
// does not wait for must have ended.
__device__ __forceinline__ void let_launch_after_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#else
  __trap();
#endif
}

// Whether blocks may form clusters: from 9.0 on. Known at compile time, so a kernel holds the way of its architecture
// alone; what follows must not be reached elsewhere.
__device__ __forceinline__ constexpr bool has_clusters() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return true;
#else
  return false;
#endif
}

// The halves of a barrier of all threads of the cluster, each for whole warps. What a thread wrote before it arrived,
// to global memory and to any block's shared memory, all see after they have waited; not so if it arrived relaxed,
// which says no more than that it has come so far, and waits for no writes.
__device__ __forceinline__ void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void cluster_arrive_relaxed() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n" ::: "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Where a block of the cluster has what lies at `own`, in shared memory, in this one. It may be read and written
// between two barriers of the cluster: the first shows that the block runs, the second that it may exit.
template <class T>
__device__ __forceinline__ T* in_block_of_cluster(T* own, unsigned rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  T* mapped;
  asm("mapa.u64 %0, %1, %2;\n" : "=l"(mapped) : "l"(own), "r"(rank));
  return mapped;
#else
  __trap();
  return own;
#endif
}

// An mbarrier, 8 bytes of shared memory from 9.0 on: each of its phases ends once the arrivals that it is made for have
// come, and all bytes that these have announced. One thread makes it, and then shows that to the cluster by the fence
// and a barrier of the cluster, which may be arrived at relaxed.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void fence_mbarrier_init() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
#else
  __trap();
#endif
}

// Arrives, and announces bytes, which may have come already.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier, unsigned bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}

// Waits for the end of the phase of this parity, the first being 0, after which all that was stored is seen. Nobody may
// come so late that the next phase has ended too.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, unsigned parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned ended;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!ended);
#else
  __trap();
#endif
}

// Stores 16 bytes behind the thread's back to where a block of the cluster has what lies at `own` in this one; its
// mbarrier, named alike, counts them.
__device__ __forceinline__ void store_in_block_of_cluster(float4* own, unsigned rank, float4 value,
                                                          uint64_t* own_barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t to, barrier;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(to) : "r"(shared_address(own)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(barrier) : "r"(shared_address(own_barrier)), "r"(rank));
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];\n" ::"r"(to),
      "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(barrier)
      : "memory");
#else
  __trap();
#endif
}

// Four 8x8 matrices of 16-bit elements from shared memory; lane 8i + j gives the address of row j of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8] over the warp, fp32 accumulators, elements of type T.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                       uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<Float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two elements in one register, `low` in the lower half; round to nearest even.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
__device__ __forceinline__ uint32_t pack<Float16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ float to_float(float value) { return value; }

__device__ __forceinline__ float to_float(BFloat16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }

__device__ __forceinline__ float to_float(Float16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(result) : "h"(value.bits));
  return result;
}

// Inverse of pack.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
  return {to_float(T{static_cast<uint16_t>(packed)}), to_float(T{static_cast<uint16_t>(packed >> 16)})};
}

template <class T>
__device__ __forceinline__ T from_float(float value);

template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}

template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
  return {static_cast<uint16_t>(pack<BFloat16>(value, 0.0f))};
}

template <>
__device__ __forceinline__ Float16 from_float<Float16>(float value) {
  return {static_cast<uint16_t>(pack<Float16>(value, 0.0f))};
}

// 2^x within 2 ulp; 0 for -infinity.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace lpd::ptx
#endif

namespace lpd::ptx {

// Once in every thread of every kernel, in those that leave early too, before it writes anything and before it reads
// what the launch before may have written. Before stands what reads weights, which no launch of a decode writes.
__device__ __forceinline__ void follow_launch_before() {
  if (!has_clusters()) return;
  wait_for_launch_before();
  let_launch_after_begin();
}

}  // namespace lpd::ptx
