// sample_tokens on the CPU. A token is one item and its fp32 row stays in cache: one pass mixes it and finds its
// maximum, one turns it into weights with a sum per block, and the draw descends a binary tree over the ids. A filter
// finds its threshold by bisection on the count (top-k) or weight (top-p) above it, dropping what is out on the way;
// nothing is sorted. Limited by reading the logits and by exp; with a filter on, by the passes over the whole row.
#include <cmath>
#include <cstdlib>
#include <new>

#include "common/cpu_kernels.h"
#include "common/order_key.h"
#include "common/philox.h"
#include "common/simd.h"

namespace lpd::LPD_ISA {
namespace {

constexpr int kBlock = 512;  // weights per partial sum, a multiple of every kWidth

// Tokens that may still be drawn, in the order of their ids. Logits and weights are padded with -inf and 0 to whole
// vectors.
struct Candidates {
  float* logits;       // mixed, not divided by the temperature
  float* weights;      // exp((logit - max) / temperature)
  double* block_sums;  // of kBlock weights each
  int32_t* ids;        // set once a filter runs
  int count;
  float max;
  float mean;                // of the whole row; not finite where some logit is not
  float scale;               // log2(e) / temperature
  double total;              // of block_sums, added in order
  const char* next_rows[2];  // logits of the token that comes next
  int64_t element;           // of them, in bytes
};

int block_end(const Candidates& c, int begin) { return c.count - begin < kBlock ? c.count : begin + kBlock; }

void pad(Candidates& c) {
  for (int i = c.count; i % Vec::kWidth != 0; ++i) c.logits[i] = -INFINITY;
}

// No FMA here: every instruction set, and plain torch, then gets the same bits and the same ties.
template <class Number>
Number mix(Number conditional, Number unconditional, Number guidance) {
  return unconditional + guidance * (conditional - unconditional);
}

// Rows with an infinity or NaN, off the fast path; returns false where nothing can be drawn.
template <class T>
bool settle_infinities(const T* conditional, Candidates& c) {
  c.max = -INFINITY;
  for (int i = 0; i < c.count; ++i) {
    if (to_float(conditional[i]) == -INFINITY) c.logits[i] = -INFINITY;
    if (std::isnan(c.logits[i])) return false;
    if (c.logits[i] > c.max) c.max = c.logits[i];
  }
  if (c.max == INFINITY) {
    for (int i = 0; i < c.count; ++i) c.logits[i] = c.logits[i] == INFINITY ? 0.0f : -INFINITY;
    c.max = 0.0f;
  }
  return c.max > -INFINITY;
}

// Fills logits, max and mean; `unconditional` may be nullptr. Returns false where nothing can be drawn.
template <class T>
bool mix_row(const T* conditional, const T* unconditional, float guidance, Candidates& c) {
  const Vec scale = broadcast(guidance);
  Vec top = broadcast(-INFINITY), sums = broadcast(0.0f);
  const int full = c.count / Vec::kWidth * Vec::kWidth;
  for (int i = 0; i < full; i += Vec::kWidth) {
    const Vec given = load(conditional + i);
    const Vec x = unconditional ? mix(given, load(unconditional + i), scale) : given;
    store(c.logits + i, x);
    top = max(top, x);
    sums = sums + x;
  }
  float sum = reduce_add(sums);
  c.max = reduce_max(top);
  for (int i = full; i < c.count; ++i) {
    const float given = to_float(conditional[i]);
    const float x = unconditional ? mix(given, to_float(unconditional[i]), guidance) : given;
    c.logits[i] = x;
    c.max = x > c.max ? x : c.max;
    sum += x;
  }
  pad(c);
  c.mean = sum / static_cast<float>(c.count);
  return std::isfinite(sum) || settle_infinities(conditional, c);  // no infinity or NaN leaves the sum finite
}

// Fills the weights, the block sums and their total. Exponentials leave the memory idle, so the next token's logits are
// fetched into L2 meanwhile. AVX-512, L-256-20 step 19, no filters: at B = 16 878 us instead of 1,488; at B = 1, whose
// logits stay in cache, 54 instead of 56.
void weigh(Candidates& c) {
  const Vec top = broadcast(c.max), scale = broadcast(c.scale);
  c.total = 0.0;
  for (int begin = 0; begin < c.count; begin += kBlock) {
    const int end = block_end(c, begin);
    Vec sum = broadcast(0.0f);
    for (int i = begin; i < end; i += Vec::kWidth) {
      if (Vec::kWidth > 1) {  // else it would be an element at a time
        for (const char* row : c.next_rows) __builtin_prefetch(row + i * c.element, 0, 2);
      }
      const Vec weight = exp2_nonpositive((load(c.logits + i) - top) * scale);
      store(c.weights + i, weight);
      sum = sum + weight;
    }
    c.block_sums[begin / kBlock] = reduce_add(sum);
    c.total += c.block_sums[begin / kBlock];
  }
}

// Drops the candidates below the threshold, in place.
void drop_below(float threshold, Candidates& c) {
  if (threshold == -INFINITY) return;
  int kept = 0;
  for (int i = 0; i < c.count; i += Vec::kWidth) {
    kept += pack_at_least(threshold, c.logits + i, c.ids + i, c.logits + kept, c.ids + kept);
  }
  c.count = kept;
  pad(c);
}

// Fills ids with 0, 1, ... Its arguments are copies, which a store to ids cannot change: so it is vectorized.
void number(int32_t* ids, int count) {
  for (int i = 0; i < count; ++i) ids[i] = i;
}

// Number and weight of the candidates from a threshold on.
struct Tail {
  double count, weight;
};

template <bool kByWeight>
Tail tail_from(float threshold, const Candidates& c) {
  const Vec least = broadcast(threshold), one = broadcast(1.0f);
  Tail tail{0.0, 0.0};
  for (int begin = 0; begin < c.count; begin += kBlock) {
    const int end = block_end(c, begin);
    Vec count = broadcast(0.0f), weight = broadcast(0.0f);
    for (int i = begin; i < end; i += Vec::kWidth) {
      const Vec logit = load(c.logits + i);
      count = count + keep_at_least(least, logit, one);
      if (kByWeight) weight = weight + keep_at_least(least, logit, load(c.weights + i));
    }
    tail.count += reduce_add(count);
    tail.weight += reduce_add(weight);
  }
  return tail;
}

// Drops the candidates below the largest threshold that leaves more than `target`: of them, or of their weight. Every
// other step of the bisection halves the values, which is quick for ordinary logits, and the others halve their keys,
// which bounds the steps for all.
template <bool kByWeight>
void keep_top(double target, Candidates& c) {
  uint32_t low = kLowestKey, high = order_key(c.max) + 1;  // enough is left at low, not enough at high
  double count_at_low = c.count, count_at_high = 0.0;
  for (int step = 0; high - low > 1 && count_at_low - count_at_high > 1.0; ++step) {
    uint32_t middle = low + (high - low) / 2;
    if (step % 2 == 0) {
      const float halfway = 0.5f * from_order_key(low) + 0.5f * from_order_key(high);
      const uint32_t by_value = order_key(low == kLowestKey ? c.mean : halfway);
      if (by_value > low && by_value < high) middle = by_value;
    }
    const Tail tail = tail_from<kByWeight>(from_order_key(middle), c);
    if ((kByWeight ? tail.weight : tail.count) <= target) {
      high = middle;
      count_at_high = tail.count;
      continue;
    }
    low = middle;
    count_at_low = tail.count;
    if (2.0 * tail.count < c.count) {
      drop_below(from_order_key(low), c);
      if (kByWeight) weigh(c);
    }
  }
  drop_below(from_order_key(low), c);
  if (kByWeight) weigh(c);
}

// Sum of the weights of candidates [begin, end).
double range_weight(const Candidates& c, int begin, int end) {
  double total = 0.0;
  for (int i = begin; i < end;) {
    const int whole_end = block_end(c, i);
    if (i % kBlock == 0 && whole_end <= end) {
      total += c.block_sums[i / kBlock];
      i = whole_end;
      continue;
    }
    const int next_block = (i / kBlock + 1) * kBlock, stop = next_block < end ? next_block : end;
    Vec sums = broadcast(0.0f);
    for (; i + Vec::kWidth <= stop; i += Vec::kWidth) sums = sums + load(c.weights + i);
    float sum = reduce_add(sums);
    for (; i < stop; ++i) sum += c.weights[i];
    total += sum;
  }
  return total;
}

// First candidate in [begin, end) whose id is at least `id`.
int first_from_id(const Candidates& c, bool filtered, int begin, int end, int id) {
  if (!filtered) return id < end ? id : end;  // candidate i is token i
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (c.ids[middle] < id) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Descends the binary tree over token ids, each level by a random number of its own and the weights of the two halves.
// An inverse CDF would draw from the same distribution with one number, but there a logit's last bit moves the
// boundaries of all later tokens; here it moves one boundary a level, so a draw hardly ever depends on how a GEMM was
// rounded.
int draw(const SampleTokensParams& p, const TokenSettings& settings, bool filtered, const Candidates& c) {
  const uint64_t seed = settings.seed;
  const auto cell = static_cast<uint32_t>(settings.cell);
  int begin = 0, end = c.count, first_id = 0;
  PhiloxWords random{};
  int level = 0;
  for (int half = tree_half(p.vocab_size); half > 0 && end - begin > 1; half /= 2, ++level) {
    if (level % 4 == 0) random = philox4x32_10(seed, cell, static_cast<uint32_t>(level / 4), PhiloxDomain::kTokens);
    const int middle = first_from_id(c, filtered, begin, end, first_id + half);
    const double left = range_weight(c, begin, middle), right = range_weight(c, middle, end);
    // The uniform is in [0, 1): a half without weight is never taken.
    if (philox_uniform(random.word[level % 4]) * (left + right) < left) {
      end = middle;
    } else {
      begin = middle;
      first_id += half;
    }
  }
  return begin;
}

int first_maximum(const Candidates& c) {
  int i = 0;
  while (reduce_max(load(c.logits + i)) < c.max) i += Vec::kWidth;
  while (c.logits[i] < c.max) ++i;
  return i;
}

template <class T>
const T* logits_row(const SampleTokensParams& p, int32_t row) {
  return row < 0 ? nullptr : static_cast<const T*>(p.logits) + row * p.logits_stride;
}

template <class T>
int64_t sample_token(const SampleTokensParams& p, int64_t m, const TokenSettings& settings, Candidates& c) {
  const T* conditional = logits_row<T>(p, p.conditional_row[m]);
  const T* unconditional = logits_row<T>(p, p.unconditional_row[m]);
  c.count = p.vocab_size;
  if (!mix_row(conditional, unconditional, settings.guidance, c)) return -1;
  if (settings.temperature == 0.0f) return first_maximum(c);

  c.scale = 1.44269504f / settings.temperature;
  if (std::isinf(c.scale)) c.scale = 3e38f;  // finite, so that the maximum keeps weight 1
  const bool by_rank = settings.top_k > 0 && settings.top_k < p.vocab_size;
  const bool by_weight = settings.top_p < 1.0f;
  const bool filtered = by_rank || by_weight;
  if (filtered) number(c.ids, c.count);
  if (by_rank) keep_top<false>(settings.top_k - 1, c);
  weigh(c);
  if (by_weight) keep_top<true>(settings.top_p * c.total, c);

  const int drawn = draw(p, settings, filtered, c);
  return filtered ? c.ids[drawn] : drawn;
}

template <class T>
void sample_token_range(const SampleTokensParams& p, int64_t begin, int64_t end) {
  const int64_t blocks = (p.vocab_size + kBlock - 1) / kBlock, padded = blocks * kBlock;
  const int64_t bytes_per_block = kBlock * (2 * sizeof(float) + sizeof(int32_t)) + sizeof(double);
  void* const scratch = std::aligned_alloc(64, static_cast<size_t>((blocks * bytes_per_block + 63) / 64 * 64));
  if (scratch == nullptr) throw std::bad_alloc();
  Candidates candidates{};
  candidates.logits = static_cast<float*>(scratch);
  candidates.weights = candidates.logits + padded;
  candidates.ids = reinterpret_cast<int32_t*>(candidates.weights + padded);
  candidates.block_sums = reinterpret_cast<double*>(candidates.ids + padded);
  candidates.element = sizeof(T);
  for (int64_t m = begin; m < end; ++m) {
    const int64_t next = m + 1 < end ? m + 1 : m;
    const int32_t next_rows[2] = {p.conditional_row[next], p.unconditional_row[next]};
    for (int i = 0; i < 2; ++i) {
      candidates.next_rows[i] =
          reinterpret_cast<const char*>(logits_row<T>(p, next_rows[i] < 0 ? next_rows[0] : next_rows[i]));
    }
    const TokenSettings settings = settings_of(p, m);
    write_token(p, m, settings, sample_token<T>(p, m, settings, candidates));
  }
  std::free(scratch);  // nothing in between throws; a destructor would add a weak reference to the unit
}

}  // namespace

void sample_tokens(const SampleTokensParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto element) { sample_token_range<decltype(element)>(p, begin, end); });
}

}  // namespace lpd::LPD_ISA
