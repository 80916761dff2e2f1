// sample_tokens on CUDA: one block draws one token. A warp holds a chunk of 1,024 consecutive ids of the mixed row in
// registers; rows of more chunks than the block has warps are walked in turns, and stay in shared memory as far as they
// fit. Without filters the logits are read once, weighed against their chunk's maximum, and one barrier later every
// warp knows the chunk that is drawn; its owner goes on alone. A filter adds two to eight passes over the row, each
// with one barrier. Limited by reading the logits, at few tokens by the latency of that read and of the phases after
// it.
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
  bool inside;
};

__device__ void read_inputs(const SampleTokensParams& p, int64_t m, TokenInputs& inputs) {
  inputs.inside = is_inside(p, m);
  if (!inputs.inside) return;
  inputs.conditional_row = p.conditional_row[m];
  inputs.unconditional_row = p.unconditional_row[m];
  inputs.settings = settings_of(p, m);
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

// Warps of the largest block. fp32 rows on the way take as many registers again as the mixed one, so where there may be
// chunks to come, warps are fewer.
template <class T, bool kInRegisters>
constexpr int kWarps = sizeof(T) == 4 && !kInRegisters ? kMaxWarps / 2 : kMaxWarps;

// Without filters a block of 16-bit logits gets by with half the registers of a multiprocessor.
template <class T, bool kFiltered, bool kInRegisters>
__global__ void __launch_bounds__(32 * kWarps<T, kInRegisters>, !kFiltered && kInRegisters && sizeof(T) == 2 ? 2 : 1)
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
  if (!inputs.inside) return;  // and nothing is written
  const TokenSettings& settings = inputs.settings;
  const Rows<T> rows = rows_of<T>(p, inputs);
  const float scale = fminf(__fdiv_rn(1.44269504f, settings.temperature), 3e38f);  // finite: the maximum keeps weight 1

  // One pass over the logits: mix, and the maximum and weight of every chunk.
  float x[kValues];
  RawChunk<T> raw = load_chunk(rows, warp);
  const float uniform = level_uniform(settings.seed, static_cast<uint32_t>(settings.cell), p.vocab_size);  // meanwhile
  for (int chunk = warp; chunk < num_chunks; chunk += num_warps) {
    mix_chunk(rows, raw, x);
    if constexpr (!kInRegisters) raw = load_chunk(rows, chunk + num_warps);
    if (!kInRegisters && chunk < resident_chunks) keep_chunk(chunks.resident + chunk * kChunk, x);
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
    if constexpr (kInRegisters) break;  // spares the registers of a next chunk
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
    if constexpr (kInRegisters) return;  // a warp's only chunk is there already
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
      SMEM_ARRAY(Exchange, exchange, 2);
      float weights[kValues] = {};
      if constexpr (kInRegisters) {
#pragma unroll
        for (int i = 0; i < kValues; ++i) weights[i] = weigh(x[i], row_top, scale);
      }
      const auto weight_of = [&](int i) { return kInRegisters ? weights[i] : weigh(x[i], row_top, scale); };

      float total = 0.0f;
      for (int chunk = lane; chunk < num_chunks; chunk += 32) total += weight_of_chunk(chunk);
      // Keys of 16-bit logits that were not mixed differ in their upper bits alone.
      const int unused_bits = rows.unconditional != nullptr ? 0 : kUnusedKeyBits<T>;
      Bracket bracket(unused_bits, static_cast<float>(p.vocab_size), warp_sum(total));
      const auto visit = [&](float bottom, const auto& f) {
        for (int chunk = warp; chunk < num_chunks; chunk += num_warps) {
          if (from_order_key(chunks.key[chunk]) < bottom) continue;
          fetch_chunk(chunk);
#pragma unroll
          for (int i = 0; i < kValues; ++i) f(x[i], weight_of(i));
        }
      };
#pragma unroll 1  // both filters run the same instructions
      for (int filter = by_rank ? 0 : 1; filter < (by_weight ? 2 : 1); ++filter) {
        const bool heavy = filter == 1;
        const float target = heavy ? settings.top_p * bracket.weight_at_low : static_cast<float>(settings.top_k - 1);
        bracket.narrow(row_key, heavy, target, visit, exchange);
      }
      threshold = bracket.threshold();

      for (int chunk = warp; chunk < num_chunks; chunk += num_warps) {
        float sum = 0.0f;
        if (from_order_key(chunks.key[chunk]) >= threshold) {
          fetch_chunk(chunk);
          float sums[4] = {};
#pragma unroll
          for (int i = 0; i < kValues; ++i) sums[i % 4] += x[i] >= threshold ? weight_of(i) : 0.0f;
          sum = warp_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
        }
        if (lane == 0) chunks.kept[chunk] = sum;
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

  fetch_chunk(drawn_chunk);
  int id;
  if (greedy) {
    int first = kChunk;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (x[i] == row_top) first = min(first, id_in_chunk<T>(i));
    }
    id = __reduce_min_sync(kAllLanes, first);
  } else {
    // In every other row of 32 ids neighbouring fours are swapped, against bank conflicts of lanes 32 bytes apart.
    const auto place = [](int id_in_chunk) { return id_in_chunk ^ (id_in_chunk >> 3 & 4); };
    const auto weight = [&](int i) { return x[i] >= threshold ? weigh(x[i], row_top, scale) : 0.0f; };
#pragma unroll
    for (int i = 0; i < kValues; i += 4) {
      store_vector(drawn_weights + place(id_in_chunk<T>(i)),
                   float4{weight(i), weight(i + 1), weight(i + 2), weight(i + 3)});
    }
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
    launch("sample_tokens", sample_tokens_kernel<T, kFiltered, true>, grid, dim3(32 * num_chunks), bytes_of_sums,
           stream, p, num_chunks, 0);
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
