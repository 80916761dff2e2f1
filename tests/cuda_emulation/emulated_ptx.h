// ptx.cuh on the CPU: the same functions with the same contracts.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "common/dtype.h"
#include "emulator.h"

namespace lpd::emulator {

struct MatrixRow {
  uint64_t halves[2];
};
struct MmaOperands {
  uint32_t a[4], b[2];
};

extern const WarpOperation kLoadMatrix, kLoadMatrixTransposed, kMmaBFloat16, kMmaFloat16;

LPD_EMULATED_ACCESS void load_matrix_row(MatrixRow& row, const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("ldmatrix: misaligned row %p", from);
  if (!is_own_shared(from)) fail("ldmatrix: row %p is not in shared memory of the block", from);
  LPD_COUNT_ACCESS(from, 16, kMatrixRead);
  row = *static_cast<const MatrixRow*>(from);
}

}  // namespace lpd::emulator

namespace lpd::ptx {

// The copy may land at any time between issue and wait: the target is spoilt now and written at the wait.
LPD_EMULATED_ACCESS void cp_async16(void* shared, const void* global, bool valid = true) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) emulator::fail("cp.async: misaligned target %p", shared);
  if (!emulator::is_own_shared(shared)) {
    emulator::fail("cp.async: target %p is not in shared memory of the block", shared);
  }
  LPD_COUNT_ACCESS(shared, 16, kCopyWrite);
  LPD_COUNT_ACCESS(valid ? global : nullptr, 16, kCopyRead);
  if (valid) {
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) emulator::fail("cp.async: misaligned source %p", global);
    emulator::check_launch_order(global, 16, false);
    static_cast<void>(*static_cast<const volatile uint64_t*>(global));  // so that ASan names the line of the issue
  }
  uint64_t* const target = static_cast<uint64_t*>(shared);
  target[0] = target[1] = ~uint64_t{0};
  emulator::push_copy(shared, valid ? global : nullptr);
}

inline void cp_async_commit() { emulator::end_copy_group(); }

template <int kGroups>
LPD_EMULATED_ACCESS void cp_async_wait() {
  emulator::Copy copy;
  while (emulator::pop_copy(kGroups, &copy)) {
    const uint64_t* const source = static_cast<const uint64_t*>(copy.from);
    uint64_t* const target = static_cast<uint64_t*>(copy.to);
    target[0] = source ? source[0] : 0;
    target[1] = source ? source[1] : 0;
  }
}

// What is asked for must be there to be read, and may not be under way: L2 would keep the old.
LPD_EMULATED_ACCESS void prefetch_l2(const void* global) {
  LPD_COUNT_ACCESS(global, 1, kPrefetch);
  emulator::check_launch_order(global, 1, false);
  static_cast<void>(*static_cast<const volatile char*>(global));
}

inline void wait_for_launch_before() { emulator::wait_for_launch_before(); }
inline void let_launch_after_begin() { emulator::let_launch_after_begin(); }

inline bool has_clusters() { return emulator::device_has_clusters(); }

inline void cluster_arrive(emulator::Place place = emulator::Place::here()) { emulator::cluster_arrive(true, place); }
inline void cluster_arrive_relaxed(emulator::Place place = emulator::Place::here()) {
  emulator::cluster_arrive(false, place);
}
inline void cluster_wait(emulator::Place place = emulator::Place::here()) { emulator::cluster_wait(place); }
inline void cluster_sync(emulator::Place place = emulator::Place::here()) {
  emulator::cluster_arrive(true, place);
  emulator::cluster_wait(place);
}

template <class T>
T* in_block_of_cluster(T* own, unsigned rank) {
  return static_cast<T*>(emulator::in_block_of_cluster(own, rank));
}

inline void mbarrier_init(uint64_t* barrier, unsigned arrivals) { emulator::mbarrier_init(barrier, arrivals); }
inline void fence_mbarrier_init() { emulator::show_mbarriers(); }
inline void mbarrier_arrive(uint64_t* barrier, unsigned bytes) { emulator::mbarrier_arrive(barrier, bytes); }

// False if none is on its way to the barrier.
LPD_EMULATED_ACCESS bool let_cluster_store_arrive(void* barrier) {
  emulator::ClusterStore store;
  if (!emulator::pop_cluster_store(barrier, &store)) return false;
  uint64_t* const target = static_cast<uint64_t*>(store.to);
  target[0] = store.words[0];
  target[1] = store.words[1];
  emulator::cluster_store_has_arrived(barrier);
  return true;
}

inline void mbarrier_wait(uint64_t* barrier, unsigned parity, emulator::Place place = emulator::Place::here()) {
  while (!emulator::mbarrier_passed(barrier, parity) && let_cluster_store_arrive(barrier)) {
  }
  emulator::mbarrier_wait(barrier, parity, place);
}

// It may arrive at any time between issue and wait: the target is spoilt now and written once somebody waits.
LPD_EMULATED_ACCESS void store_in_block_of_cluster(float4* own, unsigned rank, float4 value, uint64_t* own_barrier) {
  void* const to = emulator::in_block_of_cluster(own, rank);
  void* const barrier = emulator::in_block_of_cluster(own_barrier, rank);
  emulator::begin_cluster_store(to, barrier);
  LPD_COUNT_ACCESS(to, 16, kWrite);
  emulator::ClusterStore store{to, {}};
  __builtin_memcpy(store.words, &value, 16);
  uint64_t* const target = static_cast<uint64_t*>(to);
  target[0] = target[1] = ~uint64_t{0};
  if (emulator::end_cluster_store(store, barrier)) let_cluster_store_arrive(barrier);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, emulator::Place place = emulator::Place::here()) {
  emulator::MatrixRow in;
  emulator::load_matrix_row(in, row);
  emulator::rendezvous(emulator::kLoadMatrix, 0xffffffffu, &in, r, place);
}

inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row, emulator::Place place = emulator::Place::here()) {
  emulator::MatrixRow in;
  emulator::load_matrix_row(in, row);
  emulator::rendezvous(emulator::kLoadMatrixTransposed, 0xffffffffu, &in, r, place);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  emulator::Place place = emulator::Place::here()) {
  const emulator::MmaOperands in{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  constexpr bool kBFloat16 = std::is_same_v<T, BFloat16>;
  rendezvous(kBFloat16 ? emulator::kMmaBFloat16 : emulator::kMmaFloat16, 0xffffffffu, &in, d, place);
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return lpd::to_float(value); }
inline float to_float(Float16 value) { return lpd::to_float(value); }

template <class T>
T from_float(float value) {
  return lpd::from_float<T>(value);
}

template <class T>
uint32_t pack(float low, float high) {
  return lpd::from_float<T>(low).bits | uint32_t{lpd::from_float<T>(high).bits} << 16;
}

template <class T>
float2 unpack(uint32_t packed) {
  return {lpd::to_float(T{static_cast<uint16_t>(packed)}), lpd::to_float(T{static_cast<uint16_t>(packed >> 16)})};
}

inline float exp2_approx(float x) {
  const float result = std::exp2(x);
  return result < FLT_MIN ? 0.0f : result;  // subnormal results are flushed; a NaN is kept
}

}  // namespace lpd::ptx
