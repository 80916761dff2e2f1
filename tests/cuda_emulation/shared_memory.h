// Shared memory of the running block: one piece of dynamic memory and the static ones as they are first used.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>

#include "emulator.h"
#include "fiber.h"

#ifdef LPD_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) static_cast<void>(0)
#endif

namespace lpd::emulator {

class SharedMemory {
 public:
  void start_block(size_t dynamic_bytes) {
    if (!arena_) arena_ = map_pages(kArenaBytes), used_ = kArenaBytes;
    const size_t used = (used_ + kPage - 1) / kPage * kPage;
    renew_pages(arena_, used);
    std::memset(arena_, 0xff, used);
    ASAN_POISON_MEMORY_REGION(arena_, kArenaBytes);
    dynamic_bytes_ = dynamic_bytes;
    static_bytes_ = declarations_ = used_ = 0;
    dynamic_ = place(dynamic_bytes, 128);
  }

  char* dynamic() const { return dynamic_; }
  size_t bytes() const { return dynamic_bytes_ + static_bytes_; }
  bool contains(const void* address) const { return address >= arena_ && address < arena_ + kArenaBytes; }

  char* declared(const void* key, size_t bytes, size_t alignment) {
    for (unsigned i = 0; i < declarations_; ++i) {
      if (keys_[i] == key) return places_[i];
    }
    static_bytes_ += (bytes + 15) / 16 * 16;
    if (static_bytes_ > kMaxStaticBytes || declarations_ == keys_.size()) {
      fail("more than %zu bytes or %zu declarations of static shared memory", kMaxStaticBytes, keys_.size());
    }
    keys_[declarations_] = key;
    return places_[declarations_++] = place(bytes, std::max<size_t>(alignment, 16));
  }

 private:
  static constexpr size_t kArenaBytes = 1 << 20, kGap = 512, kMaxStaticBytes = 48 * 1024;

  char* place(size_t bytes, size_t alignment) {
    const size_t at = (used_ + kGap + alignment - 1) / alignment * alignment;
    used_ = at + bytes;
    ASAN_UNPOISON_MEMORY_REGION(arena_ + at, bytes);
    return arena_ + at;
  }

  char* arena_ = nullptr;
  char* dynamic_ = nullptr;
  size_t used_ = 0, dynamic_bytes_ = 0, static_bytes_ = 0;
  unsigned declarations_ = 0;
  std::array<const void*, 64> keys_;
  std::array<char*, 64> places_;
};

}  // namespace lpd::emulator
