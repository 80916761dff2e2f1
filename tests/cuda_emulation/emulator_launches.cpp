// Launches that may begin while the one before still runs (programmatic dependent launch). Here that one has ended, so
// what the later one does too early is found by what it touches: what the launch before wrote is remembered.
#include <cstring>

#include "emulator_state.h"

namespace lpd::emulator {
namespace {

// Words of global memory that a launch wrote, by open addressing. Fixed storage, as all that fibers write to.
class WrittenWords {
 public:
  void clear() {
    if (count_ > 0) words_.fill(0);
    count_ = 0;
  }

  void insert(uintptr_t word) {
    uintptr_t& slot = words_[find(word)];
    if (slot == word) return;
    if (++count_ > kSlots / 2) fail("a launch writes more than %zu words: too many to remember", kSlots / 2);
    slot = word;
  }

  bool contains(uintptr_t word) const { return words_[find(word)] == word; }

 private:
  static constexpr size_t kSlots = size_t{1} << 21;

  size_t find(uintptr_t word) const {
    size_t slot = word * 0x9e3779b97f4a7c15u >> 43;
    while (words_[slot] != 0 && words_[slot] != word) slot = (slot + 1) % kSlots;
    return slot;
  }

  size_t count_ = 0;
  std::array<uintptr_t, kSlots> words_;
};

std::array<WrittenWords, 2> written;
unsigned current = 0;

}  // namespace

void begin_launch() {
  current ^= 1;
  written[current].clear();
}

void forget_launches() {
  for (WrittenWords& words : written) words.clear();
}

void check_launch_order(const void* address, size_t bytes, bool writes) {
  if (!settings().launches_follow || !self || is_shared(address) || is_private(address)) return;
  const uintptr_t first = reinterpret_cast<uintptr_t>(address) / 4;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(address) + bytes - 1) / 4;
  const bool too_early = grid.early && !self->waited_for_launch;
  if (too_early && writes) fail("writes to %p before it has waited for the launch before", address);
  for (uintptr_t word = first; word <= last; ++word) {
    if (too_early && written[current ^ 1].contains(word)) {
      fail("reads %p, which the launch before wrote, before it has waited for that", address);
    }
    if (writes) written[current].insert(word);
  }
}

void wait_for_launch_before() { self->waited_for_launch = true; }

void let_launch_after_begin() {
  if (grid.early && !self->waited_for_launch) {
    fail("lets the launch after begin before it has waited for the one before");
  }
}

}  // namespace lpd::emulator
