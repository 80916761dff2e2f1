#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <new>

#ifdef LPD_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef LPD_EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>

// Fibers that are kept count as threads that may still have a race to report at exit.
extern "C" const char* __tsan_default_options() { return "atexit_sleep_ms=0"; }
#endif

#ifndef LPD_FIBER_UCONTEXT
// Saves what the calling convention says a callee keeps, and swaps stacks. %rdi: where to put the old stack pointer,
// %rsi: the new one.
extern "C" void lpd_switch_stack(void** from, void* to);
asm(R"(
  .text
  .globl lpd_switch_stack
  .hidden lpd_switch_stack
  .type lpd_switch_stack, @function
lpd_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size lpd_switch_stack, .-lpd_switch_stack
)");
#endif

namespace lpd::emulator {

char* map_pages(size_t bytes) {
  void* const pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(pages);
}

void forbid_page(char* page) { mprotect(page, kPage, PROT_NONE); }

void renew_pages(char* pages, size_t bytes) {
#ifdef LPD_EMULATOR_TSAN
  munmap(pages, bytes);
  mmap(pages, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
#elif defined(LPD_EMULATOR_ASAN)
  __asan_unpoison_memory_region(pages, bytes);
#else
  static_cast<void>(pages), static_cast<void>(bytes);
#endif
}

void adopt_thread(Fiber& host) {
  static thread_local void* stack = nullptr;
  static thread_local size_t stack_bytes = 0;
  if (!stack) {
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack, &stack_bytes);
    pthread_attr_destroy(&attributes);
  }
  host.stack = static_cast<char*>(stack);
  host.stack_bytes = stack_bytes;
#ifdef LPD_EMULATOR_TSAN
  host.tsan_fiber = __tsan_get_current_fiber();
#endif
}

void start_fiber(Fiber& fiber, void (*entry)(), size_t index) {
#ifdef LPD_EMULATOR_ASAN
  __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);  // the last user left without returning
#endif
#ifdef LPD_EMULATOR_TSAN
  if (!fiber.tsan_fiber) fiber.tsan_fiber = __tsan_create_fiber(0);
#endif
#ifdef LPD_FIBER_UCONTEXT
  static_cast<void>(index);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  constexpr size_t kSavedRegisters = 6;
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes - index % 14 * 576);
  *--top = nullptr;  // entry's return address
  *--top = reinterpret_cast<void*>(entry);
  for (size_t i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#endif
}

void entered_fiber() {
#ifdef LPD_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

void abandon_fiber(Fiber& fiber, const Fiber& host) {
#ifdef LPD_EMULATOR_TSAN
  __tsan_switch_to_fiber(fiber.tsan_fiber, __tsan_switch_to_fiber_no_sync);
  __tsan_switch_to_fiber(host.tsan_fiber, 0);
  __tsan_destroy_fiber(fiber.tsan_fiber);
  fiber.tsan_fiber = nullptr;
#else
  static_cast<void>(fiber), static_cast<void>(host);
#endif
}

void switch_fiber(Fiber& from, const Fiber& to, bool for_ever) {
#ifdef LPD_EMULATOR_TSAN
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef LPD_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.asan_fake_stack, to.stack, to.stack_bytes);
#else
  static_cast<void>(for_ever);
#endif
#ifdef LPD_FIBER_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  lpd_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
#ifdef LPD_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
#endif
}

}  // namespace lpd::emulator
