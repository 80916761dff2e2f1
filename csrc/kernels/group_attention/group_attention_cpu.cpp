// group_attention on the CPU: softmax(scale * q k^T) v for both row classes of a step, with an online softmax over key
// tiles. One item is one (segment, head). Blocks of K are transposed, so that lanes are keys for the scores, head
// dimensions for the values; one register-blocked product serves both. Limited by FMAs while the cache is in L3, by
// memory when it is not.
#include <initializer_list>

#include "common/cpu_kernels.h"
#include "common/register_product.h"
#include "common/softmax_row.h"

namespace lpd::LPD_ISA {
namespace {

constexpr int kWidth = Vec::kWidth;
// Row stride of every scratch matrix; the odd number of cache lines (17) spreads rows over the sets of L1.
constexpr int kScratchStride = 256 + 16;
constexpr int kKeyBlock = kBlockVecs * kWidth;  // keys transposed at a time
constexpr int kMaxHeadDim = 256;
constexpr int kMaxRows = 48;     // rows that share one pass over the keys
constexpr int kMaxKeys = 256;    // keys per softmax update
constexpr int kValueChunk = 64;  // keys whose V stays in L1 (16 KB at D = 64) while all rows use it
static_assert(kMaxHeadDim <= kScratchStride && kMaxKeys <= kScratchStride);

// 276 KB of the thread's stack.
struct Scratch {
  alignas(64) float q[kMaxRows * kScratchStride];          // [rows, D], scaled
  alignas(64) float scores[kMaxRows * kScratchStride];     // [rows, keys of the tile], then probabilities
  alignas(64) float sums[kMaxRows * kScratchStride];       // [rows, D], probabilities times values so far
  alignas(64) float keys[kMaxHeadDim * kKeyBlock];         // [D, kKeyBlock], transposed
  alignas(64) float key_rows[kWidth * kScratchStride];     // [kWidth, D], where K cannot be transposed in place
  alignas(64) float values[kValueChunk * kScratchStride];  // [keys, D], where V cannot be read in place
  float row_max[kMaxRows];
  float row_sum[kMaxRows];
};

Matrix<float, Fixed<kScratchStride>> scratch_matrix(float* data) { return {data, {}}; }

enum Part { kQ, kK, kV };

// One segment and head. Keys are numbered through: first the `shared` ones in the cache, which end with this step's
// context and which every row sees, then those of the query rows, which only query rows see.
template <class T>
struct Item {
  const T* qkv;        // row 0, part 0 of this head
  const T* caches[3];  // by part, position 0
  T* output;           // row first_output_row of this head
  int64_t row_stride, part_stride, cache_stride, output_stride;
  int context_start, num_context, query_start, num_query;
  int shared, head_dim, first_output_row;

  const T* key_row(Part part, int key) const {
    return key < shared ? caches[part] + key * cache_stride
                        : qkv + part * part_stride + (query_start + key - shared) * row_stride;
  }
};

template <class T>
Item<T> make_item(const GroupAttentionParams& p, int64_t index) {
  const Segment& s = p.segments[index / p.num_heads];
  const int64_t head = index % p.num_heads;
  const int64_t cached = s.cache_slot * p.cache_slot_stride + head * p.cache_head_stride;
  Item<T> item;
  item.qkv = static_cast<const T*>(p.qkv) + head * p.qkv_head_stride;
  item.caches[kQ] = nullptr;
  item.caches[kK] = static_cast<const T*>(p.k_cache) + cached;
  item.caches[kV] = static_cast<const T*>(p.v_cache) + cached;
  item.output = static_cast<T*>(p.output) + head * p.head_dim;
  item.row_stride = p.qkv_row_stride;
  item.part_stride = p.qkv_part_stride;
  item.cache_stride = p.cache_position_stride;
  item.output_stride = int64_t{p.num_heads} * p.head_dim;
  item.context_start = s.context_start;
  item.num_context = s.num_context;
  item.query_start = s.query_start;
  item.num_query = s.num_query;
  item.shared = s.cache_length + s.num_context;
  item.head_dim = p.head_dim;
  item.first_output_row = p.first_output_row;
  return item;
}

// Everything an item reads, and what it writes to: the rows of qkv, then K, V and the output.
template <class T>
FetchRows fetch_item(const Item<T>& item) {
  constexpr int64_t kSize = sizeof(T);
  FetchRows ahead(item.qkv, item.head_dim * kSize);
  if (item.query_start >= item.first_output_row) {
    ahead.add(item.output + (item.query_start - item.first_output_row) * item.output_stride, item.output_stride * kSize,
              item.num_query);
  }
  if (item.context_start >= item.first_output_row) {
    ahead.add(item.output + (item.context_start - item.first_output_row) * item.output_stride,
              item.output_stride * kSize, item.num_context);
  }
  for (const int part : {kV, kK}) ahead.add(item.caches[part], item.cache_stride * kSize, item.shared);
  for (const int part : {kV, kK, kQ}) {
    const T* rows = item.qkv + part * item.part_stride;
    ahead.add(rows + item.query_start * item.row_stride, item.row_stride * kSize, item.num_query);
    ahead.add(rows + item.context_start * item.row_stride, item.row_stride * kSize, item.num_context);
  }
  return ahead;
}

// scratch.keys[D, n] = K of keys [first, first + n), transposed; the last key is repeated up to a whole vector.
template <class T>
void transpose_keys(const Item<T>& item, int first, int n, Scratch& scratch) {
  for (int block = 0; block < n; block += kWidth) {
    const float* rows = scratch.key_rows;
    int64_t stride = kScratchStride;
    bool in_place = false;
    if constexpr (sizeof(T) == sizeof(float)) {
      in_place = block + kWidth <= n && first + block + kWidth <= item.shared;
      if (in_place) {
        rows = item.key_row(kK, first + block);
        stride = item.cache_stride;
      }
    }
    for (int i = 0; !in_place && i < kWidth; ++i) {
      const int key = first + (block + i < n ? block + i : n - 1);
      copy_row(item.key_row(kK, key), 1.0f, item.head_dim, scratch.key_rows + i * kScratchStride);
    }
    for (int d = 0; d < item.head_dim; d += 4) {
      transpose4(rows + d, stride, scratch.keys + d * kKeyBlock + block, kKeyBlock);
    }
  }
}

// Softmax of one tile, unnormalised, against the largest score so far; `visible` scores of row r count.
template <class Visible>
void update_softmax(int rows, bool first_tile, const Visible& visible, int head_dim, Scratch& scratch) {
  // Two passes: many rows' maxima run at once, where one row's maximum and exponentials would wait for each other.
  float tile_max[kMaxRows];
  for (int r = 0; r < rows; ++r) tile_max[r] = finish_scores(scratch.scores + r * kScratchStride, visible(r));
  for (int r = 0; r < rows; ++r) {
    if (visible(r) <= 0) continue;
    const float row_max = !first_tile && scratch.row_max[r] > tile_max[r] ? scratch.row_max[r] : tile_max[r];
    const float reference = softmax_reference(row_max);
    const float tile_sum = exponentiate(scratch.scores + r * kScratchStride, visible(r), reference);
    if (first_tile) {
      scratch.row_sum[r] = tile_sum;
    } else {
      const Vec rescale = exp_nonpositive(broadcast(scratch.row_max[r] - reference));
      scratch.row_sum[r] = scratch.row_sum[r] * reduce_max(rescale) + tile_sum;
      float* sums = scratch.sums + r * kScratchStride;
      for (int d = 0; d < head_dim; d += kWidth) store(sums + d, load(sums + d) * rescale);
    }
    scratch.row_max[r] = row_max;
  }
}

// sums of rows [row, row + rows) (+)= probabilities of keys [first, last) times their V; the tile starts at key `tile`.
template <class T>
void add_values(const Item<T>& item, int tile, int first, int last, int row, int rows, bool accumulate,
                Scratch& scratch, FetchRows& ahead) {
  if (rows <= 0) return;
  const int vecs = (item.head_dim + kWidth - 1) / kWidth;
  for (int key = first; key < last; key += kValueChunk) {
    const int n = last - key < kValueChunk ? last - key : kValueChunk;
    const float* values = scratch.values;
    int64_t stride = kScratchStride;
    bool in_place = false;
    if constexpr (sizeof(T) == sizeof(float)) {
      in_place = item.head_dim % kWidth == 0 && key + n <= item.shared;
      if (in_place) {
        values = item.key_row(kV, key);
        stride = item.cache_stride;
      }
    }
    for (int i = 0; !in_place && i < n; ++i) {
      copy_row(item.key_row(kV, key + i), 1.0f, item.head_dim, scratch.values + i * kScratchStride);
    }
    multiply<Floats>(rows, vecs, scratch_matrix(scratch.scores).from(row, key - tile), Matrix{values, stride}, n,
                     scratch_matrix(scratch.sums).from(row, 0), accumulate, ahead);
    accumulate = true;
  }
}

// Attention of scratch.q's rows, num_context context rows before the query rows, into scratch.sums and row_sum.
template <class T>
void attend(const Item<T>& item, int rows, int num_context, Scratch& scratch, FetchRows& ahead) {
  const int num_keys = item.shared + (num_context < rows ? item.num_query : 0);
  for (int tile = 0; tile < num_keys; tile += kMaxKeys) {
    const int tile_end = num_keys - tile < kMaxKeys ? num_keys : tile + kMaxKeys;
    const int shared_end = item.shared < tile ? tile : item.shared < tile_end ? item.shared : tile_end;
    for (int key = tile; key < tile_end; key += kKeyBlock) {
      const int n = tile_end - key < kKeyBlock ? tile_end - key : kKeyBlock;
      transpose_keys(item, key, n, scratch);
      const int row = key < shared_end ? 0 : num_context;
      multiply<Floats>(rows - row, (n + kWidth - 1) / kWidth, scratch_matrix(scratch.q).from(row, 0),
                       Matrix{scratch.keys, Fixed<kKeyBlock>()}, item.head_dim,
                       scratch_matrix(scratch.scores).from(row, key - tile), std::false_type(), ahead);
    }
    const auto visible = [&](int r) { return (r < num_context ? shared_end : tile_end) - tile; };
    update_softmax(rows, tile == 0, visible, item.head_dim, scratch);
    add_values(item, tile, tile, shared_end, 0, rows, tile > 0, scratch, ahead);
    add_values(item, tile, shared_end, tile_end, num_context, rows - num_context, shared_end > 0, scratch, ahead);
  }
}

template <class T>
void attend_item(const Item<T>& item, float scale, Scratch& scratch, FetchRows& ahead) {
  // Rows with an output: context first, then query rows.
  const auto skipped = [&](int start, int count) {
    const int before = item.first_output_row - start;
    return before <= 0 ? 0 : before < count ? before : count;
  };
  const int context_skipped = skipped(item.context_start, item.num_context);
  const int query_skipped = skipped(item.query_start, item.num_query);
  const int num_context = item.num_context - context_skipped;
  const int total = num_context + item.num_query - query_skipped;
  const auto row_index = [&](int r) -> int64_t {
    return r < num_context ? item.context_start + context_skipped + r
                           : item.query_start + query_skipped + (r - num_context);
  };

  const int passes = (total + kMaxRows - 1) / kMaxRows;
  const int pass_rows = passes > 0 ? (total + passes - 1) / passes : 0;
  for (int first = 0; first < total; first += pass_rows) {
    const int rows = total - first < pass_rows ? total - first : pass_rows;
    const int context_left = num_context > first ? num_context - first : 0;
    for (int r = 0; r < rows; ++r) {
      copy_row(item.qkv + row_index(first + r) * item.row_stride, scale, item.head_dim, scratch.q + r * kScratchStride);
    }
    attend(item, rows, context_left < rows ? context_left : rows, scratch, ahead);
    const int full = item.head_dim / kWidth * kWidth;
    for (int r = 0; r < rows; ++r) {
      T* output = item.output + (row_index(first + r) - item.first_output_row) * item.output_stride;
      const float* sums = scratch.sums + r * kScratchStride;
      const Vec factor = broadcast(1.0f / scratch.row_sum[r]);
      for (int d = 0; d < full; d += kWidth) store(output + d, load(sums + d) * factor);
      if (full < item.head_dim) store_partial(output + full, load(sums + full) * factor, item.head_dim - full);
    }
  }
}

template <class T>
void run_items(const GroupAttentionParams& p, int64_t begin, int64_t end) {
  Scratch scratch;
  for (int64_t index = begin; index < end; ++index) {
    append_kv(p, index, index + 1);
    const Item<T> item = make_item<T>(p, index);
    FetchRows ahead = index + 1 < end ? fetch_item(make_item<T>(p, index + 1)) : FetchRows(p.qkv, 1);
    attend_item(item, p.scale, scratch, ahead);
  }
}

}  // namespace

void group_attention(const GroupAttentionParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto element) { run_items<decltype(element)>(p, begin, end); });
}

}  // namespace lpd::LPD_ISA
