// What a product (register_product.h) fetches from memory into L2 while it multiplies. A block of it calls
// begin_block(), then next() before every run of steps, which returns how many steps it has, and step() in each.
#pragma once

#include <climits>
#include <cstdint>

namespace lpd {
namespace {

constexpr int kCacheLine = 64;

inline void fetch_line(const char* line) { __builtin_prefetch(line, 0, 2); }

struct FetchNothing {
  int next() const { return INT_MAX; }
  void step() const {}
  FetchNothing begin_block() const { return {}; }
};

// Two cache lines, one after the other, with every `steps` steps; each block of the product begins anew.
struct FetchPairs {
  const char* lines;
  int steps;

  int next() {
    fetch_line(lines);
    fetch_line(lines + kCacheLine);
    lines += 2 * kCacheLine;
    return steps;
  }
  void step() const {}
  FetchPairs begin_block() const { return *this; }
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

  struct Block {
    int next() {
      line = rows.next_row();
      return rows.row_lines_;
    }
    void step() {
      fetch_line(line);
      line += kCacheLine;
    }
    FetchRows& rows;
    const char* line;
  };
  Block begin_block() { return {*this, nullptr}; }

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
