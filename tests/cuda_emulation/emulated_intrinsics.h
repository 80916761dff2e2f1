// Built-in functions of CUDA C++ on the CPU. Every warp function ends in emulator::rendezvous().
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "emulator.h"

namespace lpd::emulator {

struct Shuffled {
  uint64_t bits;
  int source;  // lane
};

// Elements are uint64_t, results too, except that of a shuffle, which takes Shuffled.
extern const WarpOperation kSyncWarp, kShuffle, kBallot, kMatchAny;
extern const WarpOperation kReduceAddInt, kReduceAdd, kReduceMinInt, kReduceMin, kReduceMaxInt, kReduceMax, kReduceAnd,
    kReduceOr, kReduceXor;

template <class T>
T shuffle(uint32_t mask, T value, int source, Place place) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "CUDA shuffles up to 8 bytes");
  Shuffled in{0, source};
  std::memcpy(&in.bits, &value, sizeof(T));
  uint64_t out;
  rendezvous(kShuffle, mask, &in, &out, place);
  std::memcpy(&value, &out, sizeof(T));
  return value;
}

template <class T>
T reduce(const WarpOperation& operation, uint32_t mask, T value, Place place) {
  const uint64_t in = static_cast<uint64_t>(value);
  uint64_t out;
  rendezvous(operation, mask, &in, &out, place);
  return static_cast<T>(out);
}

// Replaces *p by update(old) in one step and returns old.
template <class T, class Update>
LPD_EMULATED_ACCESS T update_atomically(T* p, Update update) {
  using Word = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  static_assert(sizeof(T) == sizeof(Word), "atomics are of 4 or 8 bytes");
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) fail("misaligned atomic of %zu bytes at %p", sizeof(T), p);
  check_launch_order(p, sizeof(T), true);
  LPD_COUNT_ACCESS(p, sizeof(T), kAtomic);
  Word* const word = reinterpret_cast<Word*>(p);
  Word before = __atomic_load_n(word, __ATOMIC_RELAXED), after;
  T old;
  do {
    __builtin_memcpy(&old, &before, sizeof(T));
    const T updated = update(old);
    __builtin_memcpy(&after, &updated, sizeof(T));
  } while (!__atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  atomic_order(p);
  return old;
}

}  // namespace lpd::emulator

#define LPD_PLACE ::lpd::emulator::Place place = ::lpd::emulator::Place::here()

// ---- Barriers and fences ----
inline void __syncthreads(LPD_PLACE) { lpd::emulator::block_barrier(0, place); }
inline int __syncthreads_count(int predicate, LPD_PLACE) { return lpd::emulator::block_barrier(predicate, place); }
inline int __syncthreads_or(int predicate, LPD_PLACE) { return lpd::emulator::block_barrier(predicate, place) != 0; }
inline int __syncthreads_and(int predicate, LPD_PLACE) { return lpd::emulator::block_barrier(!predicate, place) == 0; }
inline void __syncwarp(uint32_t mask = 0xffffffffu, LPD_PLACE) {
  lpd::emulator::rendezvous(lpd::emulator::kSyncWarp, mask, nullptr, nullptr, place);
}
inline void __threadfence() { lpd::emulator::fence(); }
inline void __threadfence_block() { lpd::emulator::fence(); }
inline void __threadfence_system() { lpd::emulator::fence(); }
[[noreturn]] inline void __trap() { lpd::emulator::fail("__trap()"); }

// ---- Shuffles: lanes count within groups of `width`; a source outside the group is the lane itself ----
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, LPD_PLACE) {
  const int group = static_cast<int>(lpd::emulator::lane()) & ~(width - 1);
  return lpd::emulator::shuffle(mask, value, group + (source & (width - 1)), place);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, LPD_PLACE) {
  const int lane = static_cast<int>(lpd::emulator::lane()), source = lane ^ bits;
  return lpd::emulator::shuffle(mask, value, source / width > lane / width ? lane : source, place);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned distance, int width = 32, LPD_PLACE) {
  const int lane = static_cast<int>(lpd::emulator::lane()), step = static_cast<int>(distance);
  return lpd::emulator::shuffle(mask, value, lane % width + step >= width ? lane : lane + step, place);
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned distance, int width = 32, LPD_PLACE) {
  const int lane = static_cast<int>(lpd::emulator::lane()), step = static_cast<int>(distance);
  return lpd::emulator::shuffle(mask, value, lane % width < step ? lane : lane - step, place);
}

// ---- Votes and reductions of a warp ----
inline uint32_t __ballot_sync(uint32_t mask, int predicate, LPD_PLACE) {
  return lpd::emulator::reduce(lpd::emulator::kBallot, mask, static_cast<uint32_t>(predicate != 0), place);
}
inline int __any_sync(uint32_t mask, int predicate, LPD_PLACE) { return __ballot_sync(mask, predicate, place) != 0; }
inline int __all_sync(uint32_t mask, int predicate, LPD_PLACE) { return __ballot_sync(mask, !predicate, place) == 0; }

template <class T>
uint32_t __match_any_sync(uint32_t mask, T value, LPD_PLACE) {
  uint64_t in = 0, out;
  std::memcpy(&in, &value, sizeof(T));
  lpd::emulator::rendezvous(lpd::emulator::kMatchAny, mask, &in, &out, place);
  return static_cast<uint32_t>(out);
}

inline int __reduce_add_sync(uint32_t mask, int value, LPD_PLACE) {
  return lpd::emulator::reduce(lpd::emulator::kReduceAddInt, mask, value, place);
}
inline unsigned __reduce_add_sync(uint32_t mask, unsigned value, LPD_PLACE) {
  return lpd::emulator::reduce(lpd::emulator::kReduceAdd, mask, value, place);
}
inline int __reduce_min_sync(uint32_t mask, int value, LPD_PLACE) {
  return lpd::emulator::reduce(lpd::emulator::kReduceMinInt, mask, value, place);
}
inline unsigned __reduce_min_sync(uint32_t mask, unsigned value, LPD_PLACE) {
  return lpd::emulator::reduce(lpd::emulator::kReduceMin, mask, value, place);
}
inline int __reduce_max_sync(uint32_t mask, int value, LPD_PLACE) {
  return lpd::emulator::reduce(lpd::emulator::kReduceMaxInt, mask, value, place);
}
inline unsigned __reduce_max_sync(uint32_t mask, unsigned value, LPD_PLACE) {
  return lpd::emulator::reduce(lpd::emulator::kReduceMax, mask, value, place);
}
inline unsigned __reduce_and_sync(uint32_t mask, unsigned value, LPD_PLACE) {
  return lpd::emulator::reduce(lpd::emulator::kReduceAnd, mask, value, place);
}
inline unsigned __reduce_or_sync(uint32_t mask, unsigned value, LPD_PLACE) {
  return lpd::emulator::reduce(lpd::emulator::kReduceOr, mask, value, place);
}
inline unsigned __reduce_xor_sync(uint32_t mask, unsigned value, LPD_PLACE) {
  return lpd::emulator::reduce(lpd::emulator::kReduceXor, mask, value, place);
}
#undef LPD_PLACE

// ---- Atomics; T of the operand does not take part in deduction, as with CUDA's overloads ----
template <class T>
T atomicAdd(T* p, std::common_type_t<T> value) {
  return lpd::emulator::update_atomically(p, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicSub(T* p, std::common_type_t<T> value) {
  return lpd::emulator::update_atomically(p, [=](T old) { return static_cast<T>(old - value); });
}
template <class T>
T atomicMin(T* p, std::common_type_t<T> value) {
  return lpd::emulator::update_atomically(p, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicMax(T* p, std::common_type_t<T> value) {
  return lpd::emulator::update_atomically(p, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicOr(T* p, std::common_type_t<T> value) {
  return lpd::emulator::update_atomically(p, [=](T old) { return old | value; });
}
template <class T>
T atomicAnd(T* p, std::common_type_t<T> value) {
  return lpd::emulator::update_atomically(p, [=](T old) { return old & value; });
}
template <class T>
T atomicXor(T* p, std::common_type_t<T> value) {
  return lpd::emulator::update_atomically(p, [=](T old) { return old ^ value; });
}
template <class T>
T atomicExch(T* p, std::common_type_t<T> value) {
  return lpd::emulator::update_atomically(p, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return lpd::emulator::update_atomically(p, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return lpd::emulator::update_atomically(p, [=](unsigned old) { return old >= limit ? 0u : old + 1; });
}
inline unsigned atomicDec(unsigned* p, unsigned limit) {
  return lpd::emulator::update_atomically(p, [=](unsigned old) { return old == 0 || old > limit ? limit : old - 1; });
}

// ---- Memory, bits and arithmetic ----
template <class T>
T __ldg(const T* p) {
  if constexpr (sizeof(T) >= 8) {
    return lpd::load_vector<T>(p);
  } else {
    return *p;
  }
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(x));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0f ? std::fmin(x, 1.0f) : 0.0f; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
