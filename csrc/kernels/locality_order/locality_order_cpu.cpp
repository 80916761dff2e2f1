// locality_order on the CPU: one image after another on the calling thread. Neighbour counts and the distances of
// farthest-point sampling are kept up to date cell by cell; random numbers are computed only where order matters.
// Limited by integer arithmetic in L1: per step a pass over the free cells, a linear-time sort of the near ones and one
// distance update of every candidate per cell taken.
#include <cstring>
#include <new>

#include "common/cpu_kernels.h"
#include "common/philox.h"

namespace lpd::LPD_ISA {
namespace {

constexpr int kCellBits = 16;      // a grid has at most 65536 cells
constexpr int64_t kKeyBlock = 16;  // random numbers computed at a time, for the compiler to make vectors of them

// In Scratch::state, beside the neighbour counts.
constexpr uint8_t kDrawn = 0x80;

// Arrays of one kernel call, reused from image to image.
class Scratch {
 public:
  explicit Scratch(int64_t cells) : size_(cells + kKeyBlock) {
    const int64_t bytes = size_ * kBytesPerCell;
    memory_ = ::operator new(bytes);
    std::memset(memory_, 0, bytes);  // whole blocks of keys are computed, also past the last cell
    next_ = static_cast<char*>(memory_);
    keys = allocate<uint64_t>();
    sorted = allocate<uint64_t>();
    row = allocate<uint32_t>();
    column = allocate<uint32_t>();
    free_cells = allocate<uint32_t>();
    near = allocate<uint32_t>();
    list = allocate<uint32_t>();
    list_row = allocate<uint32_t>();
    list_column = allocate<uint32_t>();
    distance = allocate<uint32_t>();
    bucket = allocate<uint32_t>();
    state = allocate<uint8_t>();
    refused = allocate<uint8_t>();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete(memory_); }

  uint64_t* keys;         // [N] of cells about to be ordered
  uint64_t* sorted;       // [N] the same, ascending
  uint32_t* row;          // [N] of each cell
  uint32_t* column;       // [N]
  uint32_t* free_cells;   // [N] neither known nor in an earlier group
  uint32_t* near;         // [N] free cells whose proximity reaches the threshold
  uint32_t* list;         // [N] candidates of farthest-point sampling: the far cells, then the near ones refused
  uint32_t* list_row;     // [N]
  uint32_t* list_column;  // [N]
  uint32_t* distance;     // [N] squared, from each candidate to the closest cell taken in this group
  uint32_t* bucket;       // [N]
  uint8_t* state;         // [N] 5 * edge + corner neighbours that are known or in earlier groups, and kDrawn
  uint8_t* refused;       // [N] nonzero: within the repulsion threshold of a near cell taken in this group

 private:
  static constexpr int64_t kBytesPerCell = 2 * sizeof(uint64_t) + 9 * sizeof(uint32_t) + 2 * sizeof(uint8_t);

  template <class T>
  T* allocate() {
    T* array = reinterpret_cast<T*>(next_);
    next_ += size_ * static_cast<int64_t>(sizeof(T));
    return array;
  }

  const int64_t size_;  // of each array
  void* memory_;
  char* next_;
};

class OrderBuilder {
 public:
  OrderBuilder(const LocalityOrderParams& params, Scratch& scratch)
      : p_(params), s_(scratch), num_cells_(int64_t{params.height} * params.width) {
    int64_t cell = 0;
    for (int32_t y = 0; y < p_.height; ++y) {
      for (int32_t x = 0; x < p_.width; ++x, ++cell) {
        s_.row[cell] = static_cast<uint32_t>(y);
        s_.column[cell] = static_cast<uint32_t>(x);
      }
    }
    for (int edges = 0; edges <= 4; ++edges) {
      for (int corners = 0; corners <= 4; ++corners) {
        rank_of_[5 * edges + corners] = p_.proximity_rank[edges][corners];
        is_near_[5 * edges + corners] = p_.is_near[edges][corners];
      }
    }
  }

  void build(int64_t image) {
    seed_ = static_cast<uint64_t>(p_.seeds[image]);
    order_ = p_.order + image * num_cells_;
    num_taken_ = 0;
    num_free_ = num_cells_;
    std::memset(s_.state, 0, num_cells_);
    for (int64_t cell = 0; cell < num_cells_; ++cell) s_.free_cells[cell] = static_cast<uint32_t>(cell);
    nothing_generated_ = true;
    for (int64_t cell = 0; p_.known != nullptr && cell < num_cells_; ++cell) {
      if (p_.known[image * num_cells_ + cell] == 0) continue;
      s_.state[cell] |= kDrawn;
      count_as_generated(static_cast<uint32_t>(cell));
    }
    const int32_t* group_sizes = p_.group_sizes + image * p_.group_sizes_stride;
    for (int32_t t = 0; t < p_.steps; ++t) {
      if (group_sizes[t] > 0) draw_group(static_cast<uint32_t>(t), group_sizes[t]);
    }
    for (int64_t i = num_taken_; i < num_cells_; ++i) order_[i] = -1;
  }

 private:
  void draw_group(uint32_t step, int64_t size) {
    step_ = step;
    group_begin_ = num_taken_;
    group_end_ = num_taken_ + size;
    split_free_cells();
    take_near();
    if (num_taken_ < group_end_) fill_from_list();
    for (int64_t i = group_begin_; i < group_end_; ++i) count_as_generated(static_cast<uint32_t>(order_[i]));
  }

  // Splits the free cells into near and far ones, and drops those drawn by the group before.
  void split_free_cells() {
    // The first group of an image has no near cells, whatever the threshold: it spreads from a random cell.
    const int64_t may_be_near = !nothing_generated_;
    int64_t num_free = 0, num_near = 0;
    for (int64_t i = 0; i < num_free_; ++i) {  // without branches: they would be mispredicted
      const uint32_t cell = s_.free_cells[i];
      const uint8_t state = s_.state[cell];
      const int64_t is_free = (state & kDrawn) == 0;
      const int64_t is_near = is_free & may_be_near & is_near_[state & ~kDrawn];
      s_.free_cells[num_free] = cell;
      s_.near[num_near] = cell;
      s_.list[num_free - num_near] = cell;
      num_free += is_free;
      num_near += is_near;
    }
    num_free_ = num_free;
    num_near_ = num_near;
    num_far_ = list_length_ = num_free - num_near;
  }

  // Walks the near cells in rank order until the group is full; those refused are appended to the list.
  void take_near() {
    if (num_near_ == 0) return;
    sort_by_rank(s_.near, num_near_);
    std::memset(s_.refused, 0, num_cells_);
    for (int64_t i = 0; i < num_near_ && num_taken_ < group_end_; ++i) {
      const uint32_t cell = s_.near[i];
      if (s_.refused[cell]) {
        s_.list[list_length_++] = cell;
      } else {
        take(cell);
        refuse_around(cell);
      }
    }
  }

  void fill_from_list() {
    // If no cell was near, all of the list is far. The very first group starts at random even if it takes every cell.
    if (num_taken_ == group_begin_ && (nothing_generated_ || list_length_ > group_end_ - num_taken_))
      take_random_start();
    if (list_length_ <= group_end_ - num_taken_) {
      sort_by_rank(s_.list, num_far_);
      for (int64_t i = 0; i < list_length_; ++i) take(s_.list[i]);
      return;
    }
    for (int64_t i = 0; i < list_length_; ++i) {
      s_.list_row[i] = s_.row[s_.list[i]];
      s_.list_column[i] = s_.column[s_.list[i]];
      s_.distance[i] = UINT32_MAX;
    }
    uint32_t farthest = 0;
    for (int64_t seen = group_begin_; num_taken_ < group_end_;) {
      // A taken candidate's own distance becomes 0, so it is not picked again.
      for (; seen < num_taken_; ++seen) farthest = update_distances(static_cast<uint32_t>(order_[seen]));
      take(first_at_distance(farthest));
    }
  }

  void take_random_start() {
    compute_keys<kStartWord>(s_.list, list_length_);
    int64_t start = 0;
    for (int64_t i = 1; i < list_length_; ++i) {
      if (s_.keys[i] < s_.keys[start]) start = i;
    }
    take(s_.list[start]);
    --num_far_;
    --list_length_;
    s_.list[start] = s_.list[list_length_];  // far cells may stand in any order
  }

  // Takes `cell` into account in the candidates' squared distances; returns the largest. They fit in 32 bits unsigned
  // because a grid has at most 65536 cells, and products modulo 2^32 are right for negative differences too.
  uint32_t update_distances(uint32_t cell) {
    const uint32_t row = s_.row[cell], column = s_.column[cell];
    const uint32_t* __restrict list_row = s_.list_row;
    const uint32_t* __restrict list_column = s_.list_column;
    uint32_t* __restrict distance = s_.distance;
    uint32_t farthest = 0;
    for (int64_t i = 0; i < list_length_; ++i) {
      const uint32_t down = list_row[i] - row, right = list_column[i] - column;
      const uint32_t squared = down * down + right * right;
      const uint32_t smallest = squared < distance[i] ? squared : distance[i];
      distance[i] = smallest;
      farthest = smallest > farthest ? smallest : farthest;
    }
    return farthest;
  }

  // First candidate in list order at this squared distance; of the far cells, only those tied are compared.
  uint32_t first_at_distance(uint32_t squared) const {
    uint64_t first_key = UINT64_MAX;
    for (int64_t i = 0; i < num_far_; ++i) {
      if (s_.distance[i] != squared) continue;
      const uint64_t candidate = rank_key(s_.list[i]) | key<kTieWord>(s_.list[i]);
      if (candidate < first_key) first_key = candidate;
    }
    if (first_key != UINT64_MAX) return cell_of(first_key);
    int64_t i = num_far_;
    while (i + 1 < list_length_ && s_.distance[i] != squared) ++i;
    return s_.list[i];
  }

  // By descending proximity, then ascending tie key, then cell. Tie keys are uniform, so a cell's place within its rank
  // is nearly proportional to them: distribute, then let an insertion sort repair the few cells that share a bucket.
  void sort_by_rank(uint32_t* cells, int64_t count) {
    compute_keys<kTieWord>(cells, count);
    uint32_t start[kProximityRanks] = {}, size[kProximityRanks] = {};
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t rank = rank_key(cells[i]);
      s_.keys[i] |= rank;
      ++size[rank >> kRankShift];
    }
    for (int i = 1; i < kProximityRanks; ++i) start[i] = start[i - 1] + size[i - 1];
    const auto bucket_of = [&](uint64_t key) {
      const uint64_t tie = key >> kCellBits & 0xffffffff, rank = key >> kRankShift;
      return start[rank] + (tie * size[rank] >> 32);
    };
    std::memset(s_.bucket, 0, count * sizeof(uint32_t));
    for (int64_t i = 0; i < count; ++i) ++s_.bucket[bucket_of(s_.keys[i])];
    uint32_t next = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t in_bucket = s_.bucket[i];
      s_.bucket[i] = next;
      next += in_bucket;
    }
    for (int64_t i = 0; i < count; ++i) s_.sorted[s_.bucket[bucket_of(s_.keys[i])]++] = s_.keys[i];
    for (int64_t i = 1; i < count; ++i) {
      const uint64_t key = s_.sorted[i];
      int64_t hole = i;
      for (; hole > 0 && s_.sorted[hole - 1] > key; --hole) s_.sorted[hole] = s_.sorted[hole - 1];
      s_.sorted[hole] = key;
    }
    for (int64_t i = 0; i < count; ++i) cells[i] = cell_of(s_.sorted[i]);
  }

  void take(uint32_t cell) {
    order_[num_taken_++] = cell;
    s_.state[cell] |= kDrawn;
  }

  // Refuses, for the rest of this group, every near cell within Chebyshev distance repulsion_threshold.
  void refuse_around(uint32_t cell) {
    const int64_t row = s_.row[cell], column = s_.column[cell], reach = p_.repulsion_threshold;
    const int64_t top = row > reach ? row - reach : 0, bottom = row + reach < p_.height ? row + reach : p_.height - 1;
    const int64_t left = column > reach ? column - reach : 0;
    const int64_t right = column + reach < p_.width ? column + reach : p_.width - 1;
    for (int64_t y = top; y <= bottom; ++y) std::memset(s_.refused + y * p_.width + left, 1, right - left + 1);
  }

  // Adds a known cell, or one whose group is complete, to the neighbour counts around it.
  void count_as_generated(uint32_t cell) {
    nothing_generated_ = false;
    const int32_t row = static_cast<int32_t>(s_.row[cell]), column = static_cast<int32_t>(s_.column[cell]);
    const auto count = [&](int32_t y, int32_t x, uint8_t amount) {
      if (y >= 0 && y < p_.height && x >= 0 && x < p_.width) s_.state[int64_t{y} * p_.width + x] += amount;
    };
    for (int32_t side : {-1, 1}) {
      count(row + side, column, 5);
      count(row, column + side, 5);
      count(row + side, column - 1, 1);
      count(row + side, column + 1, 1);
    }
  }

  // Random number of (cell, this step), made unique by the cell: equal numbers resolve to the lower cell.
  template <int word>
  uint64_t key(uint32_t cell) const {
    return uint64_t{philox4x32_10(seed_, cell, step_, PhiloxDomain::kOrders).word[word]} << kCellBits | cell;
  }

  template <int word>
  void compute_keys(const uint32_t* cells, int64_t count) {
    for (int64_t begin = 0; begin < count; begin += kKeyBlock) {
      for (int64_t lane = 0; lane < kKeyBlock; ++lane) s_.keys[begin + lane] = key<word>(cells[begin + lane]);
    }
  }

  // Sorts before the random number: the closest cells come first.
  uint64_t rank_key(uint32_t cell) const {
    return static_cast<uint64_t>(kProximityRanks - 1 - rank_of_[s_.state[cell] & ~kDrawn]) << kRankShift;
  }

  static uint32_t cell_of(uint64_t key) { return static_cast<uint32_t>(key & ((1 << kCellBits) - 1)); }

  static constexpr int kRankShift = 32 + kCellBits;

  const LocalityOrderParams& p_;
  Scratch& s_;
  const int64_t num_cells_;
  uint8_t rank_of_[kProximityRanks];  // by 5 * edge + corner neighbours
  bool is_near_[kProximityRanks];
  uint64_t seed_ = 0;
  int64_t* order_ = nullptr;  // [N] row of this image; its first num_taken_ entries are written
  int64_t num_taken_ = 0;
  bool nothing_generated_ = true;
  // Of the current group.
  uint32_t step_ = 0;
  int64_t group_begin_ = 0, group_end_ = 0;  // in order_
  int64_t num_free_ = 0;                     // when it began
  int64_t num_near_ = 0;
  int64_t num_far_ = 0;  // in list; then come the refused
  int64_t list_length_ = 0;
};

}  // namespace

void locality_order(const LocalityOrderParams& params, int64_t begin, int64_t end) {
  if (begin >= end) return;
  Scratch scratch(int64_t{params.height} * params.width);
  OrderBuilder builder(params, scratch);
  for (int64_t image = begin; image < end; ++image) builder.build(image);
}

}  // namespace lpd::LPD_ISA
