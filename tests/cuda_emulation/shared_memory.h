// Shared memory of the blocks of the running cluster: in each one piece of dynamic memory and the static ones as they
// are first used, at the same places in all of them.
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

constexpr unsigned kMaxClusterBlocks = 8;  // what every GPU that has clusters can run

class SharedMemory {
 public:
  void start_cluster(unsigned blocks, size_t dynamic_bytes) {
    if (!arenas_) {
      arenas_ = map_pages(kMaxClusterBlocks * kArenaBytes);
      touched_.fill(kArenaBytes);
    }
    blocks_ = blocks;
    for (unsigned rank = 0; rank < blocks; ++rank) {
      renew_pages(arena(rank), touched_[rank]);
      std::memset(arena(rank), 0xff, touched_[rank]);
      ASAN_POISON_MEMORY_REGION(arena(rank), kArenaBytes);
    }
    used_ = static_bytes_ = num_pieces_ = 0;
    dynamic_bytes_ = dynamic_bytes;
    place(nullptr, dynamic_bytes, 128);
  }

  // Nobody may look at it any more.
  void end_block([[maybe_unused]] unsigned rank) { ASAN_POISON_MEMORY_REGION(arena(rank), kArenaBytes); }

  char* dynamic(unsigned rank) const { return arena(rank) + pieces_[0].begin; }
  size_t bytes() const { return dynamic_bytes_ + static_bytes_; }  // of each block

  // Rank of the block that an address belongs to; -1: it is not in shared memory.
  int block_of(const void* address) const {
    if (address < arenas_ || address >= arenas_ + kMaxClusterBlocks * kArenaBytes) return -1;
    return static_cast<int>((static_cast<const char*>(address) - arenas_) / static_cast<ptrdiff_t>(kArenaBytes));
  }

  char* in_block(const void* address, unsigned rank) const { return arena(rank) + offset_of(address); }

  // Whether the bytes lie in one piece that the kernel has asked for.
  bool holds(const void* address, size_t bytes) const {
    const size_t begin = offset_of(address), end = begin + bytes;
    return std::any_of(pieces_.begin(), pieces_.begin() + num_pieces_,
                       [=](const Piece& piece) { return begin >= piece.begin && end <= piece.end; });
  }

  char* declared(unsigned rank, const void* key, size_t bytes, size_t alignment) {
    for (unsigned i = 1; i < num_pieces_; ++i) {
      if (pieces_[i].key == key) return arena(rank) + pieces_[i].begin;
    }
    static_bytes_ += (bytes + 15) / 16 * 16;
    if (static_bytes_ > kMaxStaticBytes || num_pieces_ == pieces_.size()) {
      fail("more than %zu bytes or %zu declarations of static shared memory", kMaxStaticBytes, pieces_.size() - 1);
    }
    return arena(rank) + place(key, bytes, std::max<size_t>(alignment, 16));
  }

 private:
  static constexpr size_t kArenaBytes = 1 << 20, kGap = 512, kMaxStaticBytes = 48 * 1024;

  struct Piece {
    const void* key;    // names the declaration; null: dynamic memory
    size_t begin, end;  // from the start of an arena
  };

  char* arena(unsigned rank) const { return arenas_ + rank * kArenaBytes; }
  size_t offset_of(const void* address) const {
    return static_cast<size_t>(static_cast<const char*>(address) - arenas_) % kArenaBytes;
  }

  size_t place(const void* key, size_t bytes, size_t alignment) {
    const size_t begin = (used_ + kGap + alignment - 1) / alignment * alignment;
    used_ = begin + bytes;
    pieces_[num_pieces_++] = {key, begin, used_};
    for (unsigned rank = 0; rank < blocks_; ++rank) {
      ASAN_UNPOISON_MEMORY_REGION(arena(rank) + begin, bytes);
      touched_[rank] = (used_ + kPage - 1) / kPage * kPage;
    }
    return begin;
  }

  char* arenas_ = nullptr;
  unsigned blocks_ = 0, num_pieces_ = 0;
  size_t used_ = 0, dynamic_bytes_ = 0, static_bytes_ = 0;
  std::array<size_t, kMaxClusterBlocks> touched_;  // bytes that are not 0xFF
  std::array<Piece, 65> pieces_;                   // dynamic memory comes first
};

}  // namespace lpd::emulator
