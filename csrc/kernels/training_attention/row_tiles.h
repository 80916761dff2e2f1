// Chooses the rows of the teacher-forced pass that are computed together, and the keys that they see.
#pragma once

#include <cstdint>

#include "training_attention/training_attention.h"

namespace lpd {
namespace {

constexpr int kTileKeys = 128;  // keys per span

// Rows in the order of the steps, the context rows of a step before its queries: their `visible` never decreases.
struct RowTile {
  int rows;
  int row[kTrainingTileRows];      // in the sequence
  int visible[kTrainingTileRows];  // sees context keys [0, visible)
  int own[kTrainingTileRows];      // and keys [own, own + num_own) of queries
  int num_own[kTrainingTileRows];
};

// Keys [key, key + num_keys), of which rows [begin, end) of a tile see the first count[row], at least one; the counts
// never decrease.
struct KeySpan {
  int begin, end;
  int key, num_keys;
  int count[kTrainingTileRows];
};

class RowTiles {
 public:
  explicit RowTiles(const TrainingAttentionParams& p)
      : sizes_(p.group_sizes), num_steps_(p.num_steps), mutual_visibility_(p.mutual_visibility) {
    num_context_ = 1;
    for (int t = 0; t + 1 < num_steps_; ++t) num_context_ += sizes_[t];
  }

  // False once all rows have been in a tile.
  bool next(RowTile& tile) {
    tile.rows = 0;
    while (step_ < num_steps_ && tile.rows < kTrainingTileRows) {
      const int num_context = step_ == 0 ? 1 : sizes_[step_ - 1], num_query = sizes_[step_];
      const int visible = context_ + num_context;
      for (; taken_ < num_context && tile.rows < kTrainingTileRows; ++taken_) {
        add(tile, context_ + taken_, visible, 0, 0);
      }
      for (; taken_ >= num_context && taken_ < num_context + num_query && tile.rows < kTrainingTileRows; ++taken_) {
        const int first = num_context_ + query_, row = first + taken_ - num_context;
        add(tile, row, visible, mutual_visibility_ ? first : row, mutual_visibility_ ? num_query : 1);
      }
      if (taken_ == num_context + num_query) {
        ++step_;
        taken_ = 0;
        context_ += num_context;
        query_ += num_query;
      }
    }
    return tile.rows > 0;
  }

 private:
  static void add(RowTile& tile, int row, int visible, int own, int num_own) {
    tile.row[tile.rows] = row;
    tile.visible[tile.rows] = visible;
    tile.own[tile.rows] = own;
    tile.num_own[tile.rows] = num_own;
    ++tile.rows;
  }

  const int32_t* sizes_;
  int num_steps_;
  bool mutual_visibility_;
  int num_context_;
  int step_ = 0, taken_ = 0;     // rows of the step that are in a tile
  int context_ = 0, query_ = 0;  // rows of all steps before
};

// Calls visit(span) for spans that together are all pairs of a row of the tile and a key that it sees.
template <class Visit>
void for_each_span(const RowTile& tile, const Visit& visit) {
  KeySpan span;
  span.begin = 0;
  span.end = tile.rows;
  for (span.key = 0; span.key < tile.visible[tile.rows - 1]; span.key += kTileKeys) {
    while (tile.visible[span.begin] <= span.key) ++span.begin;
    for (int r = span.begin; r < span.end; ++r) {
      const int count = tile.visible[r] - span.key;
      span.count[r] = count < kTileKeys ? count : kTileKeys;
    }
    span.num_keys = span.count[span.end - 1];
    visit(span);
  }
  for (int r = 0; r < tile.rows; r = span.end) {
    span.begin = r;
    span.end = r + 1;
    while (span.end < tile.rows && tile.own[span.end] == tile.own[r]) ++span.end;
    const int last = tile.own[r] + tile.num_own[r];
    for (span.key = tile.own[r]; span.key < last; span.key += kTileKeys) {
      span.num_keys = last - span.key < kTileKeys ? last - span.key : kTileKeys;
      for (int row = span.begin; row < span.end; ++row) span.count[row] = span.num_keys;
      visit(span);
    }
  }
}

}  // namespace
}  // namespace lpd
