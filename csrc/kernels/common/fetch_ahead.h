// Prefetches from memory into L2 while a product (register_product.h) multiplies. A block of the product calls
// begin_block(), and next() of the result for every run of steps; a run knows how many it has, and each calls step().
#pragma once

#include <climits>
#include <cstdint>

namespace lpd {
namespace {

constexpr int kCacheLine = 64;

inline void fetch_line(const char* line) { __builtin_prefetch(line, 0, 2); }

struct FetchNothing {
  static constexpr int steps = INT_MAX;
  FetchNothing next() const { return {}; }
  void step() const {}
  FetchNothing begin_block() const { return {}; }
};

// Two cache lines, one after the other, with every `steps` steps; a block of the product takes up block_lines behind
// where the one before did.
struct FetchPairs {
  const char* lines;
  int steps;
  int64_t block_lines;

  FetchPairs next() {
    fetch_line(lines);
    fetch_line(lines + kCacheLine);
    lines += 2 * kCacheLine;
    return *this;
  }
  void step() const {}
  FetchPairs begin_block() {
    const FetchPairs own = *this;
    lines += block_lines * kCacheLine;
    return own;
  }
};

// Rows of memory that will be needed next, one cache line per step of a product: a wait for memory then costs little
// beside its FMAs. group_attention in L-256-20 step 15, B = 16, with guidance, on one core: an item takes 12 us when
// everything is in L2, 31 us from memory without this, 21 us with it. Slower: bursts between products, fetching into
// L1, non-temporal hints, mixing the ranges.
class FetchRows {
 public:
  // `idle` is fetched once all rows are.
  FetchRows(const void* idle, int64_t row_bytes)
      : idle_(static_cast<const char*>(idle)),
        row_lines_(static_cast<int>((row_bytes + kCacheLine - 1) / kCacheLine)) {}

  // Ranges are fetched last added first.
  void add(const void* first, int64_t stride_bytes, int64_t count) {
    if (count > 0) ranges_[num_ranges_++] = {static_cast<const char*>(first), stride_bytes, count};
  }

  // A value of its own: where one line lasted over all runs, GCC 12 kept the sums of scalar builds out of vectors, and
  // group_attention took 1.22 times as long.
  struct Run {
    int steps;
    const char* line;
    void step() {
      fetch_line(line);
      line += kCacheLine;
    }
  };
  Run next() {
    const char* line = next_row();
    return {row_lines_, line};
  }
  FetchRows& begin_block() { return *this; }

 private:
  struct Range {
    const char* first;
    int64_t stride;
    int64_t count;
  };

  const char* next_row() {
    if (num_ranges_ == 0) return idle_;
    Range& range = ranges_[num_ranges_ - 1];
    const char* row = range.first;
    range.first += range.stride;
    if (--range.count == 0) --num_ranges_;
    return row;
  }

  Range ranges_[10];
  int num_ranges_ = 0;
  const char* idle_;
  int row_lines_;
};

}  // namespace
}  // namespace lpd
