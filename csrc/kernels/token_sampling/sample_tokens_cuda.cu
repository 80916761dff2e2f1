// sample_tokens on CUDA: one block draws one token. A warp holds a chunk of 1,024 consecutive ids of the mixed row, in
// registers or, for a filter, which needs those, in shared memory; rows of more chunks than the block has warps are
// walked in turns, and stay there as far as they fit. Without filters the logits are read once, weighed against their
// chunk's maximum, and one barrier later every warp knows the chunk that is drawn; its owner goes on alone. A filter
// adds two to five passes over the row, each with one barrier. Limited by reading the logits, at few tokens by the
// latency of that read and of the phases after it.
#include <cmath>

#include "common/cuda.cuh"
#include "common/order_key.h"
#include "common/philox.h"
#include "common/ptx.cuh"
#include "token_sampling/mixed_row.cuh"
#include "token_sampling/sample_tokens.h"
#include "token_sampling/threshold_search.cuh"
#include "token_sampling/tree_draw.cuh"

namespace lpd {
namespace {

constexpr uint32_t kNanKey = 0xffffffffu;

// The arguments of one token, read from global memory by one thread of the block.
struct TokenInputs {
  int32_t conditional_row, unconditional_row;
  TokenSettings settings;
  bool inside, drawable;  // drawable: inside, and with settings to draw by
};

__device__ void read_inputs(const SampleTokensParams& p, int64_t m, TokenInputs& inputs) {
  inputs.conditional_row = p.conditional_row[m];
  inputs.unconditional_row = p.unconditional_row[m];
  inputs.inside = is_inside(p, m, inputs.conditional_row, inputs.unconditional_row);
  if (inputs.inside) inputs.settings = settings_of(p, m);
  inputs.drawable = inputs.inside && is_usable(inputs.settings);
}

template <class T>
__device__ Rows<T> rows_of(const SampleTokensParams& p, const TokenInputs& inputs) {
  const T* const logits = static_cast<const T*>(p.logits);
  Rows<T> rows;
  rows.conditional = logits + inputs.conditional_row * p.logits_stride;
  rows.unconditional = inputs.unconditional_row < 0 ? nullptr : logits + inputs.unconditional_row * p.logits_stride;
  rows.guidance = inputs.settings.guidance;
  rows.vocab_size = p.vocab_size;
  const bool aligned =
      (reinterpret_cast<uintptr_t>(rows.conditional) | reinterpret_cast<uintptr_t>(rows.unconditional)) % 16 == 0;
  rows.vector_end = aligned ? p.vocab_size / Rows<T>::kWidth * Rows<T>::kWidth : 0;
  return rows;
}

// Order key of the largest of the warp's values; kNanKey if one is NaN.
__device__ uint32_t largest_key(const float (&x)[kValues]) {
  float top = x[0];
  bool has_nan = false;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    top = fmaxf(top, x[i]);
    has_nan |= x[i] != x[i];
  }
  return __reduce_max_sync(kAllLanes, has_nan ? kNanKey : order_key(top));
}

// exp((x - top) / temperature), scale being log2(e) / temperature; 1 at the top, be it infinite or the scale huge.
__device__ __forceinline__ float weigh(float x, float top, float scale) {
  return x == top ? 1.0f : ptx::exp2_approx((x - top) * scale);
}

// A block's chunks, in dynamic shared memory.
struct Chunks {
  float* resident;  // [resident_chunks, kChunk], mixed logits
  uint32_t* key;    // [chunks], of the largest logit
  float* weight;    // [chunks], sum relative to the chunk's own maximum
  float* kept;      // [chunks], sum of what the filters left, relative to the row's
};

constexpr int kMomentStride = kMaxWarps + 8;  // in memory of the exchange; what a warp writes lies in other banks

// Warps of the largest block. fp32 rows on the way take as many registers again as the mixed one, so where there may be
// chunks to come, warps are fewer.
template <class T, bool kOneChunk>
constexpr int kWarps = sizeof(T) == 4 && !kOneChunk ? kMaxWarps / 2 : kMaxWarps;

// With one chunk to a warp a block of 16-bit logits gets by with half the registers of a multiprocessor.
template <class T, bool kFiltered, bool kOneChunk>
__global__ void __launch_bounds__(32 * kWarps<T, kOneChunk>, kOneChunk && sizeof(T) == 2 ? 2 : 1)
    sample_tokens_kernel(SampleTokensParams p, int num_chunks, int resident_chunks) {
  SMEM_DYN(dynamic);
  SMEM_ARRAY(TokenInputs, shared_inputs, 1);
  SMEM_ARRAY(float, drawn_weights, kChunk);
  Chunks chunks;
  chunks.resident = reinterpret_cast<float*>(dynamic);
  chunks.key = reinterpret_cast<uint32_t*>(chunks.resident + resident_chunks * kChunk);
  chunks.weight = reinterpret_cast<float*>(chunks.key + num_chunks);
  chunks.kept = chunks.weight + num_chunks;
  const int64_t m = blockIdx.x;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int num_warps = static_cast<int>(blockDim.x) / 32;

  ptx::follow_launch_before();  // which wrote the logits
  if (threadIdx.x == 0) read_inputs(p, m, shared_inputs[0]);
  __syncthreads();
  const TokenInputs& inputs = shared_inputs[0];
  if (!inputs.drawable) {  // where it is not inside, the tables stay as they are
    if (threadIdx.x != 0) return;
    if (inputs.inside) write_token(p, m, inputs.settings, -1);
    if (!inputs.inside && p.tokens != nullptr) p.tokens[m] = -1;
    return;
  }
  const TokenSettings& settings = inputs.settings;
  const Rows<T> rows = rows_of<T>(p, inputs);
  const float scale = fminf(__fdiv_rn(1.44269504f, settings.temperature), 3e38f);  // finite: the maximum keeps weight 1

  // One pass over the logits: mix, and the maximum and weight of every chunk.
  float x[kValues];
  RawChunk<T> raw = load_chunk(rows, warp);
  const float uniform = level_uniform(settings.seed, static_cast<uint32_t>(settings.cell), p.vocab_size);  // meanwhile
  for (int chunk = warp; chunk < num_chunks; chunk += num_warps) {
    mix_chunk(rows, raw, x);
    if constexpr (!kOneChunk) raw = load_chunk(rows, chunk + num_warps);
    if (kFiltered && chunk < resident_chunks) keep_chunk(chunks.resident + chunk * kChunk, x);
    const uint32_t key = largest_key(x);
    const float top = from_order_key(key);
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < kValues; ++i) sums[i % 4] += weigh(x[i], top, scale);
    const float sum = warp_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (lane == 0) {
      chunks.key[chunk] = key;
      chunks.weight[chunk] = sum;
    }
    if constexpr (kOneChunk) break;  // spares the registers of a next chunk
  }
  SMEM_ARRAY(Exchange, exchange, kFiltered ? 2 : 1);
  if constexpr (kFiltered) {
    // Moments of the chunks in shared memory, from where this lane put them: more registers would be needed before.
    // They go to where the second pass of a search will exchange its sums.
    Moments moments;
    for (int chunk = warp; chunk < resident_chunks; chunk += num_warps) {
#pragma unroll 2
      for (int i = 0; i < kValues; i += 4) {
        const float4 four = kept_four(chunks.resident + chunk * kChunk, i);
        moments.add(four.x), moments.add(four.y), moments.add(four.z), moments.add(four.w);
      }
    }
    float sums[4] = {moments.count, moments.sum, moments.squares, 0.0f};
    const float sum = warp_sums(sums);
    if (lane < 4) exchange[1].sums[lane * kMomentStride + warp] = sum;
  }
  __syncthreads();

  uint32_t row_key = 0;
  for (int chunk = lane; chunk < num_chunks; chunk += 32) row_key = max(row_key, chunks.key[chunk]);
  row_key = __reduce_max_sync(kAllLanes, row_key);
  if (row_key == kNanKey || row_key == kLowestKey) {
    if (threadIdx.x == 0) write_token(p, m, settings, -1);
    return;
  }
  const float row_top = from_order_key(row_key);
  const auto weight_of_chunk = [&](int chunk) {
    return chunk < num_chunks ? chunks.weight[chunk] * weigh(from_order_key(chunks.key[chunk]), row_top, scale) : 0.0f;
  };
  const auto fetch_chunk = [&](int chunk) {
    if constexpr (kOneChunk) return;  // a warp's only chunk is there already
    if (chunk < resident_chunks) {
      take_chunk(chunks.resident + chunk * kChunk, x);
    } else {
      mix_chunk(rows, load_chunk(rows, chunk), x);
    }
  };

  const bool greedy = settings.temperature == 0.0f;
  const bool by_rank = kFiltered && !greedy && settings.top_k > 0 && settings.top_k < p.vocab_size;
  const bool by_weight = kFiltered && !greedy && settings.top_p < 1.0f;
  float threshold = -INFINITY;
  if constexpr (kFiltered) {
    if (by_rank || by_weight) {
      const auto visit_chunk = [&](int chunk, bool weighed, const auto& f) {
        const auto visit_one = [&](float value) { f(value, weighed ? weigh(value, row_top, scale) : 0.0f); };
        if constexpr (kOneChunk) {
#pragma unroll 2  // few registers
          for (int i = 0; i < kValues; i += 4) {
            const float4 four = kept_four(chunks.resident + chunk * kChunk, i);
            visit_one(four.x), visit_one(four.y), visit_one(four.z), visit_one(four.w);
          }
        } else {
          fetch_chunk(chunk);
#pragma unroll
          for (int i = 0; i < kValues; ++i) visit_one(x[i]);
        }
      };
      const auto visit = [&](float bottom, bool weighed, const auto& f) {
        for (int chunk = warp; chunk < num_chunks; chunk += num_warps) {
          if (from_order_key(chunks.key[chunk]) >= bottom) visit_chunk(chunk, weighed, f);
          if constexpr (kOneChunk) break;
        }
      };

      float total = 0.0f;
      for (int chunk = lane; chunk < num_chunks; chunk += 32) total += weight_of_chunk(chunk);
      total = warp_sum(total);
      Moments moments;
      if (lane < num_warps) {
        const float* const sums = exchange[1].sums + lane;
        moments = {sums[0], sums[kMomentStride], sums[2 * kMomentStride]};
      }
      moments = {warp_sum(moments.count), warp_sum(moments.sum), warp_sum(moments.squares)};
      const float all = moments.count * static_cast<float>(num_chunks) / static_cast<float>(resident_chunks);
      // Keys of 16-bit logits that were not mixed differ in their upper bits alone.
      const int unused_bits = rows.unconditional != nullptr ? 0 : kUnusedKeyBits<T>;
      Bracket bracket(unused_bits, static_cast<float>(p.vocab_size), total);
#pragma unroll 1  // both filters run the same instructions
      for (int filter = by_rank ? 0 : 1; filter < (by_weight ? 2 : 1); ++filter) {
        const bool heavy = filter == 1;
        if (heavy && by_rank) {
          float sums[kTailSums] = {};
          const float lowest = bracket.threshold();
          visit(lowest, true, [&](float value, float weight) { sums[0] += value >= lowest ? weight : 0.0f; });
          bracket.weight_at_low = __shfl_sync(kAllLanes, block_sums(sums, exchange[bracket.turn].sums), 0);
          bracket.turn ^= 1;
        }
        const float target = heavy ? settings.top_p * bracket.weight_at_low : static_cast<float>(settings.top_k - 1);
        Expected expected(moments, heavy ? settings.top_p : target / all, heavy ? scale * 0.69314718f : 0.0f);
        if (heavy && by_rank) expected.logit = NAN;
        bracket.narrow(row_key, heavy, target, expected, visit, exchange);
      }
      threshold = bracket.threshold();

      for (int chunk = warp; chunk < num_chunks; chunk += num_warps) {
        float sum = 0.0f;
        if (from_order_key(chunks.key[chunk]) >= threshold) {
          visit_chunk(chunk, true, [&](float value, float weight) { sum += value >= threshold ? weight : 0.0f; });
          sum = warp_sum(sum);
        }
        if (lane == 0) chunks.kept[chunk] = sum;
        if constexpr (kOneChunk) break;
      }
      __syncthreads();
    }
  }

  // The chunk that holds the token; its warp goes on alone.
  const int chunk_bits = max(levels_of(p.vocab_size) - kChunkBits, 0);
  int drawn_chunk;
  if (greedy) {
    int first = num_chunks;
    for (int chunk = lane; chunk < num_chunks; chunk += 32) {
      if (chunks.key[chunk] == row_key) first = min(first, chunk);
    }
    drawn_chunk = __reduce_min_sync(kAllLanes, first);
  } else if (by_rank || by_weight) {
    drawn_chunk = descend(chunk_bits, kChunkBits, uniform,
                          [&](int chunk) { return chunk < num_chunks ? chunks.kept[chunk] : 0.0f; });
  } else {
    drawn_chunk = descend(chunk_bits, kChunkBits, uniform, weight_of_chunk);
  }
  if (warp != drawn_chunk % num_warps) return;

  // f(i, values i to i + 3 of this lane).
  const auto visit_fours = [&](const auto& f) {
    if constexpr (kOneChunk && kFiltered) {
#pragma unroll 2
      for (int i = 0; i < kValues; i += 4) f(i, kept_four(chunks.resident + drawn_chunk * kChunk, i));
    } else {
      fetch_chunk(drawn_chunk);
#pragma unroll
      for (int i = 0; i < kValues; i += 4) f(i, float4{x[i], x[i + 1], x[i + 2], x[i + 3]});
    }
  };
  int id;
  if (greedy) {
    int first = kChunk;
    visit_fours([&](int i, float4 four) {
      const float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (values[k] == row_top) first = min(first, id_in_chunk<T>(i + k));
      }
    });
    id = __reduce_min_sync(kAllLanes, first);
  } else {
    // In every other row of 32 ids neighbouring fours are swapped, against bank conflicts of lanes 32 bytes apart.
    const auto place = [](int id_in_chunk) { return id_in_chunk ^ (id_in_chunk >> 3 & 4); };
    const auto weight = [&](float value) { return value >= threshold ? weigh(value, row_top, scale) : 0.0f; };
    visit_fours([&](int i, float4 four) {
      store_vector(drawn_weights + place(id_in_chunk<T>(i)),
                   float4{weight(four.x), weight(four.y), weight(four.z), weight(four.w)});
    });
    __syncwarp();
    id = descend(kChunkBits, 0, uniform, [&](int i) { return drawn_weights[place(i)]; });
  }
  if (lane == 0) write_token(p, m, settings, int64_t{drawn_chunk} * kChunk + id);
}

template <class T, bool kFiltered>
void launch_for(const SampleTokensParams& p, void* stream) {
  const int num_chunks = (p.vocab_size + kChunk - 1) / kChunk;
  const dim3 grid(static_cast<unsigned>(p.num_tokens));
  const int bytes_of_sums = num_chunks * (kFiltered ? 12 : 8);
  if (num_chunks <= kMaxWarps) {
    const int resident = kFiltered ? num_chunks : 0;
    launch("sample_tokens", sample_tokens_kernel<T, kFiltered, true>, grid, dim3(32 * num_chunks),
           static_cast<size_t>(resident) * kChunk * sizeof(float) + bytes_of_sums, stream, p, num_chunks, resident);
    return;
  }
  // The filters' passes find as much of the mixed row in shared memory as every architecture has.
  constexpr int kSharedBytes = 99 * 1024, kStaticBytes = 6 * 1024;
  const int free_bytes = kSharedBytes - kStaticBytes - bytes_of_sums, chunk_bytes = kChunk * int{sizeof(float)};
  int resident = kFiltered && free_bytes > 0 ? free_bytes / chunk_bytes : 0;
  if (resident > num_chunks) resident = num_chunks;
  launch("sample_tokens", sample_tokens_kernel<T, kFiltered, false>, grid, dim3(32 * kWarps<T, false>),
         static_cast<size_t>(resident) * chunk_bytes + bytes_of_sums, stream, p, num_chunks, resident);
}

template <class T>
void launch_dtype(const SampleTokensParams& p, void* stream) {
  if (p.top_k != nullptr || p.top_p != nullptr) {
    launch_for<T, true>(p, stream);
  } else {
    launch_for<T, false>(p, stream);
  }
}

}  // namespace

void launch_sample_tokens(const SampleTokensParams& params, void* stream) {
  if (params.num_tokens == 0) return;
  dispatch_dtype(params.dtype, [&](auto element) { launch_dtype<decltype(element)>(params, stream); });
}

}  // namespace lpd
