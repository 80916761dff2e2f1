// Stacks and the switch between them, announced to the sanitizer this build is for.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(LPD_EMULATOR_UCONTEXT)
#define LPD_FIBER_UCONTEXT
#include <ucontext.h>
#endif

namespace lpd::emulator {

struct Fiber {
  char* stack = nullptr;  // lowest address
  size_t stack_bytes = 0;
#ifdef LPD_FIBER_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  void* asan_fake_stack = nullptr;
  void* tsan_fiber = nullptr;
};

constexpr size_t kPage = 4096;

// Zeroed memory of its own pages, never freed.
char* map_pages(size_t bytes);
void forbid_page(char* page);

// Forgets what is at mapped pages: also who accessed it, where TSan runs.
void renew_pages(char* pages, size_t bytes);

// The running thread of the operating system as a fiber to come back to; fills in the bounds of its stack.
void adopt_thread(Fiber& host);

// Makes `fiber` enter `entry` when it is switched to next; entry calls entered_fiber() and never returns. `index`
// shifts the stacks of different fibers against each other, so that they do not meet in the same cache sets.
void start_fiber(Fiber& fiber, void (*entry)(), size_t index);
void entered_fiber();

// For a fiber that has not come to its end and will not be switched to again; `host`, which calls this, comes after all
// it has done.
void abandon_fiber(Fiber& fiber, const Fiber& host);

// `for_ever`: nothing will switch back to `from`. Orders no memory, as far as TSan is told.
void switch_fiber(Fiber& from, const Fiber& to, bool for_ever);

}  // namespace lpd::emulator
