// A token's two rows of logits, read in chunks of 1,024 consecutive ids by a warp, 32 a lane, and mixed in fp32.
#pragma once

#include <cmath>

#include "common/cuda.cuh"
#include "common/ptx.cuh"

namespace lpd {
namespace {

constexpr int kValues = 32;  // of a chunk in one lane
constexpr int kChunkBits = 10;
constexpr int kChunk = 1 << kChunkBits;

// The rows that a token mixes.
template <class T>
struct Rows {
  static constexpr int kWidth = 16 / sizeof(T);  // elements of a 128-bit load
  const T* conditional;                          // [V]
  const T* unconditional;                        // [V], or nullptr: no guidance
  float guidance;
  int vocab_size;
  int vector_end;  // 128-bit loads cover the ids below: all but V % kWidth, none where a row is not aligned to them
};

// Id within its chunk of value i of this lane: a warp's 128-bit loads cover 512 consecutive bytes.
template <class T>
__device__ __forceinline__ int id_in_chunk(int i) {
  constexpr int kWidth = Rows<T>::kWidth;
  return i / kWidth * (32 * kWidth) + static_cast<int>(threadIdx.x) % 32 * kWidth + i % kWidth;
}

// Rounded after every operation, as on the CPU, so that ties are the same.
__device__ __forceinline__ float mix(float conditional, float unconditional, float guidance) {
  if (conditional == -INFINITY) return conditional;
  return __fadd_rn(unconditional, __fmul_rn(guidance, __fsub_rn(conditional, unconditional)));
}

// This lane's share of a chunk of both rows, as loaded.
template <class T>
struct RawChunk {
  static constexpr int kWords = kValues * sizeof(T) / 4;
  uint32_t conditional[kWords], unconditional[kWords];
};

template <class T>
__device__ __forceinline__ void put(uint32_t* words, int i, T value) {
  if constexpr (sizeof(T) == 4) {
    words[i] = __float_as_uint(value);
  } else {
    words[i / 2] =
        i % 2 ? (words[i / 2] & 0xffffu) | uint32_t{value.bits} << 16 : (words[i / 2] & 0xffff0000u) | value.bits;
  }
}

template <class T>
__device__ __forceinline__ float get(const uint32_t* words, int i) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(words[i]);
  } else {
    return ptx::to_float(T{static_cast<uint16_t>(i % 2 ? words[i / 2] >> 16 : words[i / 2])});
  }
}

// Loads a chunk of one row, -inf past its end.
template <class T>
__device__ __forceinline__ void load_chunk(const T* row, const Rows<T>& rows, int chunk, uint32_t* words) {
  constexpr int kWidth = Rows<T>::kWidth;
  const int first = chunk * kChunk;
  uint32_t excluded = __float_as_uint(-INFINITY);
  if constexpr (sizeof(T) == 2) excluded = ptx::pack<T>(-INFINITY, -INFINITY);
#pragma unroll
  for (int v = 0; v < kValues / kWidth; ++v) {
    const int id = first + id_in_chunk<T>(v * kWidth);
    uint4 four{excluded, excluded, excluded, excluded};
    if (id < rows.vector_end) four = load_vector<uint4>(row + id);
    words[4 * v] = four.x;
    words[4 * v + 1] = four.y;
    words[4 * v + 2] = four.z;
    words[4 * v + 3] = four.w;
  }
  if (first + kChunk <= rows.vector_end || rows.vector_end == rows.vocab_size) return;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int id = first + id_in_chunk<T>(i);
    if (id >= rows.vector_end && id < rows.vocab_size) put(words, i, row[id]);
  }
}

template <class T>
__device__ __forceinline__ RawChunk<T> load_chunk(const Rows<T>& rows, int chunk) {
  RawChunk<T> raw;
  load_chunk(rows.conditional, rows, chunk, raw.conditional);
  if (rows.unconditional != nullptr) load_chunk(rows.unconditional, rows, chunk, raw.unconditional);
  return raw;
}

template <class T>
__device__ __forceinline__ void mix_chunk(const Rows<T>& rows, const RawChunk<T>& raw, float (&x)[kValues]) {
  const bool guided = rows.unconditional != nullptr;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    x[i] = get<T>(raw.conditional, i);
    if (guided) x[i] = mix(x[i], get<T>(raw.unconditional, i), rows.guidance);
  }
}

// A chunk in shared memory, laid out so that a lane reads back its own values without bank conflicts.
__device__ void keep_chunk(float* kept, const float (&x)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues; i += 4) {
    store_vector(kept + i * 32 + threadIdx.x % 32 * 4, float4{x[i], x[i + 1], x[i + 2], x[i + 3]});
  }
}

// Values i to i + 3 of this lane; i is a multiple of 4.
__device__ __forceinline__ float4 kept_four(const float* kept, int i) {
  return load_vector<float4>(kept + i * 32 + threadIdx.x % 32 * 4);
}

__device__ void take_chunk(const float* kept, float (&x)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues; i += 4) {
    const float4 four = kept_four(kept, i);
    x[i] = four.x;
    x[i + 1] = four.y;
    x[i + 2] = four.z;
    x[i + 3] = four.w;
  }
}

}  // namespace
}  // namespace lpd
