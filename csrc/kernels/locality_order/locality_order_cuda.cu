// locality_order on CUDA: every cell has a 32-bit score, and to take the next cell is to find the largest.
// One block per image, whose threads own four cells at a time: one warp for up to 256 cells, where a pick needs no
// barrier, beyond that a thread per four cells, at most 1024 threads. All state is in shared memory.
// Limited by latency: the picks of an image, one per cell, follow one another.
#include <algorithm>

#include "common/cuda.cuh"
#include "common/philox.h"
#include "common/ptx.cuh"
#include "locality_order/locality_order.h"

namespace lpd {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxOneWarpCells = 256;

// A score is 0 for a cell that cannot be taken. Otherwise it is one of
//   list score:      level (6 bits), then the first 26 bits of the inverted tie key;
//   farthest score:  squared distance to the closest cell taken in this group, then the first bits of the list score;
//   start score:     1, then the first 31 bits of the inverted start key.
// With proximity ranks 0 to 24, of which the last n are near, the level of a cell is rank + n + 1: n + 1 to 25 if it is
// far, 26 to n + 25 if it is near. A near cell that is refused falls by 25, to 1 to n, which is behind the far ones.
// Cells of equal score are told apart by their exact keys: the bits left out, then the cell.
enum class ScoreKind { kList, kStart };
constexpr int kListTieBits = 26;
constexpr uint32_t kFirstNearScore = uint32_t{kProximityRanks + 1} << kListTieBits;
constexpr uint32_t kRefusal = uint32_t{kProximityRanks} << kListTieBits;
constexpr uint32_t kStartFlag = 0x80000000u;

// The effect of the cell taken last on the scores of the others.
enum class Rule { kNothing, kRefuse, kSpread };

struct Pick {
  uint32_t score;
  uint32_t cell;  // or kTied
};

constexpr uint32_t kTied = 0xffffffffu;  // several cells have this score

struct Place {
  int row;
  int column;
};

constexpr int kNoCell = -1;
constexpr Place kNowhere = {-(1 << 20), -(1 << 20)};  // farther from the grid than any repulsion threshold

class OrderBuilder {
 public:
  __device__ OrderBuilder(const LocalityOrderParams& p, unsigned char* shared)
      : height_(p.height),
        width_(p.width),
        num_cells_(p.height * p.width),
        repulsion_threshold_(p.repulsion_threshold),
        inverse_width_(1.0f / static_cast<float>(p.width)),
        seed_(static_cast<uint64_t>(load_vector<int64_t>(p.seeds + blockIdx.x))),
        num_free_(num_cells_) {
    const uint32_t largest_distance = squared_distance({0, 0}, {height_ - 1, width_ - 1});
    list_bits_ = min(__clz(static_cast<int>(largest_distance)), 31);
    first_place_ = place_of(4 * thread());
    stride_ = place_of(4 * num_threads());
    picks_ = reinterpret_cast<uint64_t*>(shared);
    levels_ = reinterpret_cast<uint32_t*>(picks_ + 2 * kWarpSize);
    group_sizes_ = reinterpret_cast<int32_t*>(levels_ + 32);
    scores_ = levels_ + 64;
    drawn_ = scores_ + (num_cells_ + 3) / 4 * 4;
    order_ = reinterpret_cast<uint16_t*>(drawn_ + num_words() + 2);
  }

  __device__ void build(const LocalityOrderParams& p) {
    const int64_t image = blockIdx.x;
    if (thread() == 0) set_levels(p);
    set_drawn(p.known == nullptr ? nullptr : p.known + image * num_cells_);
    __syncthreads();
    int num_known = 0;
    for (int word = lane(); word < num_words(); word += kWarpSize) num_known += __popc(drawn_[1 + word]);
    num_free_ -= __reduce_add_sync(kAllLanes, num_known);

    const int32_t* group_sizes = p.group_sizes + image * p.group_sizes_stride;
    for (int first = 0; first < p.steps; first += kWarpSize) {
      const int count = min(kWarpSize, p.steps - first);
      __syncthreads();
      if (thread() < count) group_sizes_[thread()] = group_sizes[first + thread()];
      __syncthreads();
      for (int i = 0; i < count; ++i) {
        const int size = min(group_sizes_[i], num_free_);
        if (size > 0) draw_group(static_cast<uint32_t>(first + i), size);
      }
    }
    int64_t* order = p.order + image * num_cells_;
    for (int i = thread(); i < num_cells_; i += num_threads()) {
      store_vector(order + i, i < num_taken_ ? int64_t{order_[i]} : int64_t{-1});
    }
  }

 private:
  __device__ static int thread() { return static_cast<int>(threadIdx.x); }
  __device__ static int num_threads() { return static_cast<int>(blockDim.x); }
  __device__ static int lane() { return thread() % kWarpSize; }
  __device__ static int warp() { return thread() / kWarpSize; }
  __device__ static int num_warps() { return num_threads() / kWarpSize; }
  __device__ int num_words() const { return (num_cells_ + 31) / 32; }

  // Exact: two roundings move (cell + 1/2) / width by less than its distance to the next integer.
  __device__ Place place_of(int cell) const {
    const int row = static_cast<int>((static_cast<float>(cell) + 0.5f) * inverse_width_);
    return {row, cell - row * width_};
  }

  __device__ Place advance(Place place, Place by) const {
    const int column = place.column + by.column;
    const bool wraps = column >= width_;
    return {place.row + by.row + wraps, wraps ? column - width_ : column};
  }

  __device__ Place next(Place place) const {
    const bool wraps = place.column + 1 == width_;
    return {place.row + wraps, wraps ? 0 : place.column + 1};
  }

  __device__ static uint32_t squared_distance(Place a, Place b) {
    const uint32_t down = a.row - b.row, right = a.column - b.column;
    return down * down + right * right;
  }

  __device__ void set_levels(const LocalityOrderParams& p) {
    int num_near = 0;
    for (const auto& row : p.is_near) {
      for (bool is_near : row) num_near += is_near;
    }
    for (int edges = 0; edges <= 4; ++edges) {
      for (int corners = 0; corners <= 4; ++corners) {
        levels_[5 * edges + corners] = p.proximity_rank[edges][corners] + num_near + 1;
      }
    }
  }

  __device__ void set_drawn(const uint8_t* known /* [N] or nullptr */) {
    for (int word = warp(); word < num_words(); word += num_warps()) {
      const int cell = word * 32 + lane();
      const uint32_t bits = __ballot_sync(kAllLanes, known != nullptr && cell < num_cells_ && known[cell] != 0);
      if (lane() == 0) drawn_[1 + word] = bits;
    }
    if (thread() == 0) drawn_[0] = drawn_[1 + num_words()] = 0;
  }

  __device__ void draw_group(uint32_t step, int size) {
    step_ = step;
    last_cell_ = kNoCell;
    last_ = kNowhere;
    const int begin = num_taken_, end = begin + size;
    const bool nothing_generated = num_free_ == num_cells_;
    if (!nothing_generated) {
      score_cells(ScoreKind::kList);
      while (num_taken_ < end) {
        const Pick pick = best<Rule::kRefuse>();
        if (pick.score < kFirstNearScore) break;
        take(pick);
      }
    }
    if (num_taken_ == begin && (nothing_generated || num_free_ > size)) {
      score_cells(ScoreKind::kStart);
      take(best<Rule::kNothing>());
      if (num_taken_ < end) score_cells(ScoreKind::kList);
    }
    if (num_taken_ < end && num_free_ > size) {
      make_farthest_scores(begin);
      while (num_taken_ < end) take(best<Rule::kSpread>());
    }
    while (num_taken_ < end) take(best<Rule::kNothing>());  // all that is left, in list order

    num_free_ -= size;
    __syncthreads();  // order_ is written, and nobody needs drawn_ as it was
    for (int i = begin + thread(); i < end; i += num_threads()) {
      atomicOr(drawn_ + 1 + order_[i] / 32, 1u << order_[i] % 32);
    }
  }

  __device__ void score_cells(ScoreKind kind) {
    score_kind_ = kind;
    __syncthreads();
    for (int cell = thread(); cell < (num_cells_ + 3) / 4 * 4; cell += num_threads()) {
      uint32_t score = 0;
      if (cell < num_cells_ && (drawn_[1 + cell / 32] >> cell % 32 & 1) == 0) {
        const PhiloxWords random = random_words(cell);
        score = kind == ScoreKind::kStart ? kStartFlag | ~random.word[kStartWord] >> 1
                                          : level(cell) << kListTieBits | ~random.word[kTieWord] >> (32 - kListTieBits);
      }
      scores_[cell] = score;
    }
    __syncthreads();
  }

  // Turns list scores into farthest scores, given the cells taken since `begin`.
  __device__ void make_farthest_scores(int begin) {
    __syncthreads();
    Place first_place = first_place_;
    for (int first = 4 * thread(); first < num_cells_; first += 4 * num_threads()) {
      uint32_t closest[4] = {UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX};
      for (int i = begin; i < num_taken_; ++i) {
        const Place taken = place_of(order_[i]);
        Place place = first_place;
        for (uint32_t& distance : closest) {
          distance = min(distance, squared_distance(place, taken));
          place = next(place);
        }
      }
      const auto farthest_score = [&](uint32_t distance, uint32_t list_score) {
        return list_score == 0 ? 0 : distance << list_bits_ | list_score >> 1 >> (31 - list_bits_);
      };
      const uint4 list = load_vector<uint4>(scores_ + first);
      store_vector(scores_ + first, uint4{farthest_score(closest[0], list.x), farthest_score(closest[1], list.y),
                                          farthest_score(closest[2], list.z), farthest_score(closest[3], list.w)});
      first_place = advance(first_place, stride_);
    }
  }

  // Brings the scores up to date and returns the largest. The cell taken last has had no effect before.
  template <Rule rule>
  __device__ Pick best() {
    Pick mine = {0, 0};
    Place first_place = first_place_;
    for (int first = 4 * thread(); first < num_cells_; first += 4 * num_threads()) {
      const uint4 old = load_vector<uint4>(scores_ + first);
      uint32_t scores[4] = {old.x, old.y, old.z, old.w};
      Place place = first_place;
      for (int i = 0; i < 4; ++i) {
        scores[i] = first + i == last_cell_ ? 0 : updated<rule>(scores[i], place);
        mine.cell = scores[i] > mine.score ? first + i : scores[i] == mine.score ? kTied : mine.cell;
        mine.score = max(mine.score, scores[i]);
        place = next(place);
      }
      store_vector(scores_ + first, uint4{scores[0], scores[1], scores[2], scores[3]});
      first_place = advance(first_place, stride_);
    }
    mine = best_of_warp(mine);
    if (num_warps() == 1) return mine;
    uint64_t* picks = next_picks();
    if (lane() == 0) store_vector(picks + warp(), uint2{mine.score, mine.cell});
    __syncthreads();
    uint2 other = {0, 0};
    if (lane() < num_warps()) other = load_vector<uint2>(picks + lane());
    return best_of_warp({other.x, other.y});
  }

  template <Rule rule>
  __device__ uint32_t updated(uint32_t score, Place place) const {
    if constexpr (rule == Rule::kRefuse) {
      const int reach = repulsion_threshold_;
      const bool in_rows = static_cast<uint32_t>(place.row - last_.row + reach) <= 2u * reach;
      const bool in_columns = static_cast<uint32_t>(place.column - last_.column + reach) <= 2u * reach;
      if (score >= kFirstNearScore && in_rows && in_columns) return score - kRefusal;
    }
    if constexpr (rule == Rule::kSpread) {
      const uint32_t list_mask = (1u << list_bits_) - 1;
      return min(score, squared_distance(place, last_) << list_bits_ | (score & list_mask));
    }
    return score;
  }

  __device__ static Pick best_of_warp(Pick mine) {
    const uint32_t score = __reduce_max_sync(kAllLanes, mine.score);
    const uint32_t lanes = __ballot_sync(kAllLanes, mine.score == score);
    const uint32_t cell = __shfl_sync(kAllLanes, mine.cell, __ffs(static_cast<int>(lanes)) - 1);
    return {score, __popc(lanes) == 1 ? cell : kTied};
  }

  __device__ void take(Pick pick) {
    const int cell = static_cast<int>(pick.cell == kTied ? first_of_tied(pick.score) : pick.cell);
    if (thread() == 0) order_[num_taken_] = static_cast<uint16_t>(cell);
    ++num_taken_;
    last_cell_ = cell;
    last_ = place_of(cell);
  }

  // Returns the cell with the largest exact key among those with this score.
  __device__ uint32_t first_of_tied(uint32_t score) {
    __syncwarp();  // other lanes wrote the scores that are read here; other warps, before the barrier of best()
    uint64_t key = 0;
    for (int cell = thread(); cell < num_cells_; cell += num_threads()) {
      if (scores_[cell] == score) key = max(key, exact_key(cell));
    }
    key = largest_of_warp(key);
    uint64_t* picks = next_picks();
    if (lane() == 0) store_vector(picks + warp(), key);
    __syncthreads();
    key = largest_of_warp(lane() < num_warps() ? load_vector<uint64_t>(picks + lane()) : 0);
    return 0xffff - static_cast<uint32_t>(key & 0xffff);
  }

  __device__ static uint64_t largest_of_warp(uint64_t key) {
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) key = max(key, __shfl_xor_sync(kAllLanes, key, offset));
    return key;
  }

  // Level, random number and cell; larger comes first. All near cells that meet far ones here have been refused.
  __device__ uint64_t exact_key(int cell) const {
    const PhiloxWords random = random_words(cell);
    const uint64_t last = 0xffff - cell;
    if (score_kind_ == ScoreKind::kStart) return uint64_t{~random.word[kStartWord]} << 16 | last;
    const uint32_t list_level = level(cell) > kProximityRanks ? level(cell) - kProximityRanks : level(cell);
    return uint64_t{list_level} << 48 | uint64_t{~random.word[kTieWord]} << 16 | last;
  }

  // By the neighbours drawn before this group.
  __device__ uint32_t level(int cell) const {
    const Place place = place_of(cell);
    const uint32_t above = drawn_around(place.row - 1, place.column), below = drawn_around(place.row + 1, place.column);
    const uint32_t beside = drawn_around(place.row, place.column);
    const int edges = __popc((above & 2) | (beside & 5)) + __popc(below & 2);
    const int corners = __popc(above & 5) + __popc(below & 5);
    return levels_[5 * edges + corners];
  }

  // Bits 0 to 2: whether (row, column - 1), (row, column) and (row, column + 1) are drawn; 0 outside the grid.
  __device__ uint32_t drawn_around(int row, int column) const {
    if (row < 0 || row >= height_) return 0;
    const uint32_t first = 32 + row * width_ + column - 1;
    const uint64_t words = uint64_t{drawn_[first / 32 + 1]} << 32 | drawn_[first / 32];
    const uint32_t inside = 7 - (column == 0) - 4 * (column == width_ - 1);
    return static_cast<uint32_t>(words >> first % 32) & inside;
  }

  __device__ PhiloxWords random_words(int cell) const {
    return philox4x32_10(seed_, static_cast<uint32_t>(cell), step_, PhiloxDomain::kOrders);
  }

  // Two sets in turn: until one is written again, a barrier has passed since it was read.
  __device__ uint64_t* next_picks() {
    which_picks_ ^= 1;
    return picks_ + which_picks_ * kWarpSize;
  }

  const int height_, width_, num_cells_, repulsion_threshold_;
  const float inverse_width_;
  const uint64_t seed_;
  int list_bits_;      // of a farthest score: what the largest distance of the grid leaves
  Place first_place_;  // of this thread's first cell
  Place stride_;       // from one group of four cells of this thread to the next

  // Shared memory.
  uint64_t* picks_;       // [2, 32] one of each warp: a Pick or an exact key
  uint32_t* levels_;      // [25] by 5 * edge + corner neighbours
  int32_t* group_sizes_;  // [32] of the steps from the last multiple of 32 on
  uint32_t* scores_;      // [N], then 0 up to a multiple of 4
  uint32_t* drawn_;       // a bit per cell that is known or in an earlier group, between two words of 0
  uint16_t* order_;       // [N], of which num_taken_ are written

  // The same in all threads.
  int num_free_;  // cells that were neither known nor in an earlier group when this one began
  int num_taken_ = 0;
  int which_picks_ = 0;
  // Of the current group.
  uint32_t step_ = 0;
  ScoreKind score_kind_ = ScoreKind::kList;
  int last_cell_ = kNoCell;  // the cell taken last
  Place last_ = kNowhere;    // its place
};

__global__ void __launch_bounds__(kMaxThreads) locality_order_kernel(const LocalityOrderParams p) {
  SMEM_DYN(shared);
  ptx::follow_launch_before();  // which may have written seeds and known cells
  OrderBuilder(p, shared).build(p);
}

}  // namespace

void launch_locality_order(const LocalityOrderParams& p, void* stream) {
  if (p.batch == 0) return;
  const int cells = p.height * p.width;
  const int quads_in_warps = (cells + 4 * kWarpSize - 1) / (4 * kWarpSize) * kWarpSize;
  const int threads = cells <= kMaxOneWarpCells ? kWarpSize : std::min(kMaxThreads, quads_in_warps);
  launch("locality_order", locality_order_kernel, dim3(static_cast<unsigned>(p.batch)), dim3(threads),
         static_cast<size_t>(locality_order_shared_bytes(p.height, p.width)), stream, p);
}

}  // namespace lpd
