// The hooks that -fsanitize=thread calls before every plain access: here the counters, instead of TSan's library.
// Atomic operations of kernels are counted by update_atomically(); those that come this way are the C++ library's in
// host code, and are simply executed.
#include <cstddef>
#include <cstdint>

#include "emulator.h"

using lpd::emulator::Access;

#define LPD_SITE __builtin_return_address(0)

static void report_access(const void* site, const void* address, size_t bytes, Access access) {
  lpd::emulator::check_shared_access(address, bytes);
  lpd::emulator::check_launch_order(address, bytes, access == Access::kWrite);
  lpd::emulator::count_access(site, address, bytes, access);
}

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define LPD_ACCESS(bytes)                                                                          \
  void __tsan_read##bytes(void* p) { report_access(LPD_SITE, p, bytes, Access::kRead); }           \
  void __tsan_write##bytes(void* p) { report_access(LPD_SITE, p, bytes, Access::kWrite); }         \
  void __tsan_unaligned_read##bytes(void* p) { report_access(LPD_SITE, p, bytes, Access::kRead); } \
  void __tsan_unaligned_write##bytes(void* p) { report_access(LPD_SITE, p, bytes, Access::kWrite); }
LPD_ACCESS(1)
LPD_ACCESS(2)
LPD_ACCESS(4)
LPD_ACCESS(8)
LPD_ACCESS(16)

// A struct copied at once: nvcc would move it in pieces that this cannot know; counted as words.
static void count_words(const void* site, void* p, size_t bytes, Access access) {
  for (size_t at = 0; at < bytes; at += 4) {
    report_access(site, static_cast<char*>(p) + at, bytes - at < 4 ? bytes - at : 4, access);
  }
}
void __tsan_read_range(void* p, size_t bytes) { count_words(LPD_SITE, p, bytes, Access::kRead); }
void __tsan_write_range(void* p, size_t bytes) { count_words(LPD_SITE, p, bytes, Access::kWrite); }

#define LPD_FETCH(bits, operation)                                                                                \
  uint##bits##_t __tsan_atomic##bits##_fetch_##operation(volatile uint##bits##_t* p, uint##bits##_t value, int) { \
    return __atomic_fetch_##operation(p, value, __ATOMIC_SEQ_CST);                                                \
  }
#define LPD_EXCHANGE_IF(bits, strength, weak)                                                                 \
  int __tsan_atomic##bits##_compare_exchange_##strength(volatile uint##bits##_t* p, uint##bits##_t* expected, \
                                                        uint##bits##_t value, int, int) {                     \
    return __atomic_compare_exchange_n(p, expected, value, weak, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);         \
  }
#define LPD_ATOMICS(bits)                                                                                \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) {                     \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                         \
  }                                                                                                      \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* p, uint##bits##_t value, int) {              \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                                        \
  }                                                                                                      \
  uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* p, uint##bits##_t value, int) { \
    return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);                                              \
  }                                                                                                      \
  LPD_FETCH(bits, add)                                                                                   \
  LPD_FETCH(bits, sub)                                                                                   \
  LPD_FETCH(bits, and)                                                                                   \
  LPD_FETCH(bits, or)                                                                                    \
  LPD_FETCH(bits, xor)                                                                                   \
  LPD_FETCH(bits, nand)                                                                                  \
  LPD_EXCHANGE_IF(bits, strong, false)                                                                   \
  LPD_EXCHANGE_IF(bits, weak, true)
LPD_ATOMICS(8)
LPD_ATOMICS(16)
LPD_ATOMICS(32)
LPD_ATOMICS(64)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

}  // extern "C"
