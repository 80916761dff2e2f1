// Element types of activations, weights and caches; 16-bit types are storage only, arithmetic is fp32.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace lpd {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Throws std::runtime_error: "unknown `what` `value`". Not inline: a throw adds weak symbols to a unit.
[[noreturn]] void throw_unknown(const char* what, int value);

namespace {  // internal linkage: units built for different instruction sets must not share code

// Calls use(T{}) with the element type T that dtype names.
template <class Use>
auto dispatch_dtype(DType dtype, const Use& use) {
  switch (dtype) {
    case DType::kFloat32: return use(float{});
    case DType::kBFloat16: return use(BFloat16{});
    case DType::kFloat16: return use(Float16{});
    default: throw_unknown("dtype", static_cast<int>(dtype));
  }
}

// Of those of 16 bits.
template <class Use>
auto dispatch_dtype16(DType dtype, const Use& use) {
  switch (dtype) {
    case DType::kBFloat16: return use(BFloat16{});
    case DType::kFloat16: return use(Float16{});
    default: throw_unknown("16-bit dtype", static_cast<int>(dtype));
  }
}

LPD_HOST_DEVICE inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

LPD_HOST_DEVICE inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
  // Subnormal: magnitude * 2^-24 is exact in fp32.
  const float scaled = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
  return bits_to_float(sign | float_to_bits(scaled));
}

// All conversions from fp32 round to nearest even, as torch does.
template <class T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline Float16 from_float<Float16>(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {
    // Subnormal result: adding 0.5 aligns the 2^-24 grid with the fp32 mantissa, and the adder rounds to even.
    const float aligned = bits_to_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_to_bits(aligned) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

}  // namespace
}  // namespace lpd
