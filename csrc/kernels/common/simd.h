// Thin fp32 vector for the instruction set this unit is compiled for (LPD_ISA); 16-bit types convert on load and store.
// Everything is internal to the unit: two units never share code built for different instruction sets.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#if defined(LPD_ISA_AVX2) || defined(LPD_ISA_AVX512)
#include <immintrin.h>
#endif

// Unrolls the loop that follows before anything else is done to it, so that a small array lives in registers.
#if defined(__clang__)
#define LPD_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define LPD_UNROLL _Pragma("GCC unroll 16")
#else
#define LPD_UNROLL
#endif

namespace lpd {
namespace {

#if defined(LPD_ISA_AVX512)

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;
};

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Vec load(const Float16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(BFloat16* p, Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, is_nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
inline void store(Float16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline Vec round_to_int(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a holds whole numbers in [0, 255].
inline void store_bytes(uint8_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
// 2^n for integral n in [-126, 127].
inline Vec exp2_int(Vec n) {
  return {
      _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
// Lanes [0, n) of a; `fill` in the others.
inline Vec keep_first(Vec a, int n, float fill) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>((1u << n) - 1), _mm512_set1_ps(fill), a.v)};
}
// out[i * out_stride + lane] = in[lane * in_stride + i] for i < 4: four elements of kWidth rows, transposed.
inline void transpose4(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  const auto gather = [&](int64_t first) {
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(in + first * in_stride));
    v = _mm512_insertf32x4(v, _mm_loadu_ps(in + (first + 4) * in_stride), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps(in + (first + 8) * in_stride), 2);
    return _mm512_insertf32x4(v, _mm_loadu_ps(in + (first + 12) * in_stride), 3);
  };
  const __m512 a = gather(0), b = gather(1), c = gather(2), d = gather(3);
  const __m512d ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)),
                ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
  const __m512d cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(c, d)),
                cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
  _mm512_storeu_ps(out, _mm512_castpd_ps(_mm512_unpacklo_pd(ab_low, cd_low)));
  _mm512_storeu_ps(out + out_stride, _mm512_castpd_ps(_mm512_unpackhi_pd(ab_low, cd_low)));
  _mm512_storeu_ps(out + 2 * out_stride, _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high)));
  _mm512_storeu_ps(out + 3 * out_stride, _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high)));
}
// b where a >= threshold, else 0.
inline Vec keep_at_least(Vec threshold, Vec a, Vec b) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, threshold.v, _CMP_GE_OQ), b.v)};
}
// Packs the lanes of values[0, kWidth) that are >= threshold, and their ids, to the front of the outputs; returns how
// many. Writes kWidth elements. The outputs may be the inputs or stand before them.
inline int pack_at_least(float threshold, const float* values, const int32_t* ids, float* out_values,
                         int32_t* out_ids) {
  const __m512 value = _mm512_loadu_ps(values);
  const __m512i id = _mm512_loadu_si512(ids);
  const __mmask16 kept = _mm512_cmp_ps_mask(value, _mm512_set1_ps(threshold), _CMP_GE_OQ);
  _mm512_storeu_ps(out_values, _mm512_maskz_compress_ps(kept, value));
  _mm512_storeu_si512(out_ids, _mm512_maskz_compress_epi32(kept, id));
  return __builtin_popcount(kept);
}

#elif defined(LPD_ISA_AVX2)

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;
};

inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline Vec load(const Float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(BFloat16* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), even), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  rounded = _mm256_blendv_epi8(rounded, quiet, is_nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store(Float16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
inline float reduce_add(Vec a) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
inline float reduce_max(Vec a) {
  __m128 top = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  top = _mm_max_ps(top, _mm_movehl_ps(top, top));
  return _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
}
inline Vec round_to_int(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a holds whole numbers in [0, 255].
inline void store_bytes(uint8_t* p, Vec a) {
  const __m256i words = _mm256_cvtps_epi32(a.v);
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(shorts, shorts));
}
// 2^n for integral n in [-126, 127].
inline Vec exp2_int(Vec n) {
  return {
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23))};
}
// Lanes [0, n) of a; `fill` in the others.
inline Vec keep_first(Vec a, int n, float fill) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 keep = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
  return {_mm256_blendv_ps(_mm256_set1_ps(fill), a.v, keep)};
}
// out[i * out_stride + lane] = in[lane * in_stride + i] for i < 4: four elements of kWidth rows, transposed.
inline void transpose4(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  const auto gather = [&](int64_t first) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(in + first * in_stride)),
                                _mm_loadu_ps(in + (first + 4) * in_stride), 1);
  };
  const __m256 a = gather(0), b = gather(1), c = gather(2), d = gather(3);
  const __m256d ab_low = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)),
                ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
  const __m256d cd_low = _mm256_castps_pd(_mm256_unpacklo_ps(c, d)),
                cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
  _mm256_storeu_ps(out, _mm256_castpd_ps(_mm256_unpacklo_pd(ab_low, cd_low)));
  _mm256_storeu_ps(out + out_stride, _mm256_castpd_ps(_mm256_unpackhi_pd(ab_low, cd_low)));
  _mm256_storeu_ps(out + 2 * out_stride, _mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high)));
  _mm256_storeu_ps(out + 3 * out_stride, _mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high)));
}
// b where a >= threshold, else 0.
inline Vec keep_at_least(Vec threshold, Vec a, Vec b) {
  return {_mm256_and_ps(b.v, _mm256_cmp_ps(a.v, threshold.v, _CMP_GE_OQ))};
}

#else  // scalar

struct Vec {
  static constexpr int kWidth = 1;
  float v;
};

inline Vec broadcast(float x) { return {x}; }
template <class T>
inline Vec load(const T* p) {
  return {to_float(*p)};
}
template <class T>
inline void store(T* p, Vec a) {
  *p = from_float<T>(a.v);
}
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }  // a * b + c
inline float reduce_add(Vec a) { return a.v; }
inline float reduce_max(Vec a) { return a.v; }
inline Vec round_to_int(Vec a) { return {__builtin_nearbyintf(a.v)}; }
// a holds whole numbers in [0, 255].
inline void store_bytes(uint8_t* p, Vec a) { *p = static_cast<uint8_t>(a.v); }
// 2^n for integral n in [-126, 127].
inline Vec exp2_int(Vec n) { return {bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n.v) + 127) << 23)}; }
// Lanes [0, n) of a; `fill` in the others.
inline Vec keep_first(Vec a, int n, float fill) { return {n > 0 ? a.v : fill}; }
// out[i * out_stride + lane] = in[lane * in_stride + i] for i < 4: four elements of kWidth rows, transposed.
inline void transpose4(const float* in, int64_t /*in_stride*/, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < 4; ++i) out[i * out_stride] = in[i];
}
// b where a >= threshold, else 0.
inline Vec keep_at_least(Vec threshold, Vec a, Vec b) { return {a.v >= threshold.v ? b.v : 0.0f}; }

#endif

// out[i * out_stride + r] = word i of in[r], for i and r < 4: four words of four rows, transposed. A word is four
// bytes.
inline void transpose_words(const char* const* in, uint32_t* out, int64_t out_stride) {
#if defined(LPD_ISA_AVX2) || defined(LPD_ISA_AVX512)
  const auto row = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(in[r])); };
  const __m128i a = row(0), b = row(1), c = row(2), d = row(3);
  const __m128i ab_low = _mm_unpacklo_epi32(a, b), ab_high = _mm_unpackhi_epi32(a, b);
  const __m128i cd_low = _mm_unpacklo_epi32(c, d), cd_high = _mm_unpackhi_epi32(c, d);
  const auto put = [&](int64_t i, __m128i words) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * out_stride), words);
  };
  put(0, _mm_unpacklo_epi64(ab_low, cd_low));
  put(1, _mm_unpackhi_epi64(ab_low, cd_low));
  put(2, _mm_unpacklo_epi64(ab_high, cd_high));
  put(3, _mm_unpackhi_epi64(ab_high, cd_high));
#else
  for (int r = 0; r < 4; ++r) {
    for (int i = 0; i < 4; ++i) std::memcpy(out + i * out_stride + r, in[r] + 4 * i, 4);
  }
#endif
}

// exp(x) for x <= 87: about 1 ulp, 0 below -87.3, NaN for NaN (Cody-Waite reduction, degree-6 polynomial).
inline Vec exp_upto_87(Vec x) {
#if !defined(LPD_ISA_AVX2) && !defined(LPD_ISA_AVX512)
  if (!(x.v >= -87.33654f)) return {x.v < 0.0f ? 0.0f : x.v};
#endif
  const Vec floor = broadcast(-87.33654f);
  const Vec clamped = max(floor, x);         // the second operand where either is NaN
  const Vec shift = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = fma(clamped, broadcast(1.44269504f), shift) - shift;
  Vec r = fma(n, broadcast(-0.693359375f), clamped);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec poly = broadcast(1.38638e-3f);
  poly = fma(poly, r, broadcast(8.36748e-3f));
  poly = fma(poly, r, broadcast(4.166724e-2f));
  poly = fma(poly, r, broadcast(1.6666534e-1f));
  poly = fma(poly, r, broadcast(0.5f));
  poly = fma(poly, r, broadcast(1.0f));
  poly = fma(poly, r, broadcast(1.0f));
#if defined(LPD_ISA_AVX512)
  return {_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x.v, floor.v, _CMP_NLT_UQ), poly.v, n.v)};
#elif defined(LPD_ISA_AVX2)
  return {_mm256_and_ps((poly * exp2_int(n)).v, _mm256_cmp_ps(x.v, floor.v, _CMP_NLT_UQ))};
#else
  return poly * exp2_int(n);
#endif
}

// As softmax needs it.
inline Vec exp_nonpositive(Vec x) { return exp_upto_87(x); }

// 2^x for x <= 0: about 1 ulp, 0 below -125 (polynomial of degree 6 on [-1/2, 1/2], 2^0 = 1 exactly).
inline Vec exp2_nonpositive(Vec x) {
  const Vec floor = broadcast(-125.0f);
#if defined(LPD_ISA_AVX512)
  const Vec n = round_to_int(x);
  const Vec r = x - n;
#else
  const Vec clamped = max(x, floor);
  const Vec n = round_to_int(clamped);
  const Vec r = clamped - n;
#endif
  Vec poly = broadcast(1.535336196e-04f);
  poly = fma(poly, r, broadcast(1.339887502e-03f));
  poly = fma(poly, r, broadcast(9.618436918e-03f));
  poly = fma(poly, r, broadcast(5.550332367e-02f));
  poly = fma(poly, r, broadcast(2.402264774e-01f));
  poly = fma(poly, r, broadcast(6.931471825e-01f));
  poly = fma(poly, r, broadcast(1.0f));
#if defined(LPD_ISA_AVX512)
  return {_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x.v, floor.v, _CMP_GE_OQ), poly.v, n.v)};
#else
  return keep_at_least(floor, x, poly * exp2_int(n));
#endif
}

// The first n (< kWidth) elements; the rest read as `fill`, and are not touched by the store.
template <class T>
inline Vec load_partial(const T* p, int n, float fill = 0.0f) {
  float buffer[Vec::kWidth];
  for (int i = 0; i < Vec::kWidth; ++i) buffer[i] = i < n ? to_float(p[i]) : fill;
  return load(buffer);
}
template <class T>
inline void store_partial(T* p, Vec a, int n) {
  float buffer[Vec::kWidth];
  store(buffer, a);
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(buffer[i]);
}

#if !defined(LPD_ISA_AVX512)
// Packs the lanes of values[0, kWidth) that are >= threshold, and their ids, to the front of the outputs; returns how
// many.
inline int pack_at_least(float threshold, const float* values, const int32_t* ids, float* out_values,
                         int32_t* out_ids) {
  int kept = 0;
  for (int i = 0; i < Vec::kWidth; ++i) {
    const float value = values[i];
    const int32_t id = ids[i];
    out_values[kept] = value;
    out_ids[kept] = id;
    kept += value >= threshold;
  }
  return kept;
}
#endif

}  // namespace
}  // namespace lpd
