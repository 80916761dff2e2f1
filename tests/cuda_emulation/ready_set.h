// The threads of a cluster that can run.
#pragma once

#include <array>
#include <cstdint>

namespace lpd::emulator {

constexpr unsigned kMaxThreads = 2048;  // of a cluster of blocks, in the emulator; a block has 1024 at most

class ReadySet {
 public:
  void clear() { words_.fill(0), count_ = 0; }
  bool empty() const { return count_ == 0; }
  void insert(unsigned i) { words_[i / 64] |= uint64_t{1} << i % 64, ++count_; }
  void erase(unsigned i) { words_[i / 64] &= ~(uint64_t{1} << i % 64), --count_; }

  // First member at or above i; from 0 again if there is none. Not for an empty set.
  unsigned upwards(unsigned i) const {
    uint64_t word = words_[i / 64] & ~uint64_t{0} << i % 64;
    unsigned w = i / 64;
    while (word == 0) word = words_[w = (w + 1) % kWords];
    return 64 * w + static_cast<unsigned>(__builtin_ctzll(word));
  }

  unsigned downwards(unsigned i) const {
    uint64_t word = words_[i / 64] & ~uint64_t{0} >> (63 - i % 64);
    unsigned w = i / 64;
    while (word == 0) word = words_[w = (w + kWords - 1) % kWords];
    return 64 * w + 63 - static_cast<unsigned>(__builtin_clzll(word));
  }

 private:
  static constexpr unsigned kWords = kMaxThreads / 64;
  std::array<uint64_t, kWords> words_;
  unsigned count_;
};

}  // namespace lpd::emulator
