// Multiplies a word of a row by the words of a vector of columns: one product of floats, two of bfloat16, four of
// bytes. add(sum, row(w), columns(w)) for all words, then value(sum). Sums that have sum(value) may be taken up again;
// those of bytes are total(value).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/simd.h"

namespace lpd {
namespace {

struct Floats {
  using Sum = Vec;
  using Row = Vec;
  using Columns = Vec;
  static Sum zero() { return broadcast(0.0f); }
  static Sum sum(Vec value) { return value; }
  static Row row(const float* word) { return broadcast(*word); }
  static Columns columns(const float* words) { return load(words); }
  static Sum add(Sum sum, Row row, Columns columns) { return fma(row, columns, sum); }
  static Vec value(Sum sum) { return sum; }
};

struct FloatWords : Floats {
  static Row row(const uint32_t* word) { return broadcast(bits_to_float(*word)); }
  static Columns columns(const uint32_t* words) { return load(reinterpret_cast<const float*>(words)); }
};

// The two halves of each word as floats.
struct BFloat16Words {
  struct Pair {
    Vec low, high;
  };
  using Sum = Vec;
  using Row = Pair;
  using Columns = Pair;
  static Sum zero() { return broadcast(0.0f); }
  static Row row(const uint32_t* word) {
    return {broadcast(bits_to_float(*word << 16)), broadcast(bits_to_float(*word & 0xffff0000u))};
  }
  static Columns columns(const uint32_t* words) {
#if defined(LPD_ISA_AVX512)
    const __m512i w = _mm512_loadu_si512(words);
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(w, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))}};
#elif defined(LPD_ISA_AVX2)
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(w, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))}};
#else
    return row(words);
#endif
  }
  static Sum add(Sum sum, Row row, Columns columns) {
    return fma(row.high, columns.high, fma(row.low, columns.low, sum));
  }
  static Vec value(Sum sum) { return sum; }
};

#if defined(LPD_ISA_AVX512)

// Unsigned bytes times signed ones; pairs of products fit 32 bits but not 16, so halves are multiplied as 16 bits.
struct ByteWords {
  struct Halves {
    __m512i even, odd;
  };
  using Sum = __m512i;
  using Row = Halves;
  using Columns = Halves;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Row row(const uint32_t* word) {
    return {_mm512_set1_epi32(static_cast<int>(*word & 0x00ff00ffu)),
            _mm512_set1_epi32(static_cast<int>(*word >> 8 & 0x00ff00ffu))};
  }
  static Columns columns(const uint32_t* words) {
    const __m512i w = _mm512_loadu_si512(words);
    return {_mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), _mm512_srai_epi16(w, 8)};
  }
  static Sum add(Sum sum, Row row, Columns columns) {
    const Sum even = _mm512_add_epi32(sum, _mm512_madd_epi16(row.even, columns.even));
    return _mm512_add_epi32(even, _mm512_madd_epi16(row.odd, columns.odd));
  }
  static Vec value(Sum sum) { return {_mm512_cvtepi32_ps(sum)}; }
  static Vec total(Vec value) { return value; }
};

// The next two are for processors that have the instruction. It is written out because GCC 12 copies and spills the
// sums around the intrinsics.
struct VnniByteWords {
  using Sum = __m512i;
  using Row = __m512i;
  using Columns = __m512i;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Row row(const uint32_t* word) { return _mm512_set1_epi32(static_cast<int>(*word)); }
  static Columns columns(const uint32_t* words) { return _mm512_loadu_si512(words); }
  static Sum add(Sum sum, Row row, Columns columns) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(row), "v"(columns));
    return sum;
  }
  static Vec value(Sum sum) { return {_mm512_cvtepi32_ps(sum)}; }
};

struct NativeBFloat16Words {
  using Sum = __m512;
  using Row = __m512i;
  using Columns = __m512i;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Row row(const uint32_t* word) { return _mm512_set1_epi32(static_cast<int>(*word)); }
  static Columns columns(const uint32_t* words) { return _mm512_loadu_si512(words); }
  static Sum add(Sum sum, Row row, Columns columns) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(row), "v"(columns));
    return sum;
  }
  static Vec value(Sum sum) { return {sum}; }
};

#elif defined(LPD_ISA_AVX2)

// Rows and columns have been split into pairs of 16 bits (split_bytes): two steps of the product for each word. A pair
// of products fits 32 bits but not 16, where vpmaddubsw saturates; so two multiplications and two additions do what
// eight FMAs do. The sums stay integers from pass to pass.
struct ByteWords {
  using Sum = __m256i;
  using Row = __m256i;
  using Columns = __m256i;
  static Sum zero() { return _mm256_setzero_si256(); }
  static Sum sum(Vec value) { return _mm256_castps_si256(value.v); }
  static Row row(const uint32_t* pair) { return _mm256_set1_epi32(static_cast<int>(*pair)); }
  static Columns columns(const uint32_t* pairs) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs)); }
  static Sum add(Sum sum, Row row, Columns columns) { return _mm256_add_epi32(sum, _mm256_madd_epi16(row, columns)); }
  static Vec value(Sum sum) { return {_mm256_castsi256_ps(sum)}; }
  static Vec total(Vec value) { return {_mm256_cvtepi32_ps(_mm256_castps_si256(value.v))}; }
};

// The even and the odd signed bytes of each word.
inline void split_bytes(const uint32_t* words, uint32_t* even, uint32_t* odd) {
  const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(even), _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(odd), _mm256_srai_epi16(w, 8));
}

#else

struct ByteWords {
  using Sum = int32_t;
  using Row = uint32_t;
  using Columns = uint32_t;
  static Sum zero() { return 0; }
  static Row row(const uint32_t* word) { return *word; }
  static Columns columns(const uint32_t* words) { return *words; }
  static Sum add(Sum sum, Row row, Columns columns) {
    for (int shift = 0; shift < 32; shift += 8) {
      sum += static_cast<int32_t>(row >> shift & 0xffu) * static_cast<int8_t>(columns >> shift & 0xffu);
    }
    return sum;
  }
  static Vec value(Sum sum) { return {static_cast<float>(sum)}; }
  static Vec total(Vec value) { return value; }
};

#endif

}  // namespace
}  // namespace lpd
