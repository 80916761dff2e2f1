// Checks of operator arguments: each names the argument, its value and what is allowed, before anything is written.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/dtype.h"

namespace lpd::checks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... message) {
  throw std::runtime_error(text(message...));
}

// For messages of plain values. One that has to be put together first (`shape_text`) costs as much as an operator of
// few rows, so it is made only where `fail` needs it.
template <class... Parts>
void check(bool condition, const Parts&... message) {
  if (!condition) fail(message...);
}

template <class Numbers>
std::string list_text(const Numbers& numbers) {
  std::string list;
  for (const int64_t number : numbers) list += (list.empty() ? "" : ", ") + std::to_string(number);
  return "[" + list + "]";
}

inline std::string shape_text(const Tensor& t) { return list_text(t.sizes()); }

inline const char* dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    default: return "another dtype";
  }
}

inline std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device()) : "another device";
}

// `first` is the operator's first argument.
inline void check_device(const Tensor& t, const char* name, const Tensor& first) {
  if (t.device() == first.device()) return;
  fail(name, " must be on the same device as the other arguments (", device_text(first), "), got ", device_text(t));
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType expected) {
  check(t.scalar_type() == expected, name, " must be ", dtype_text(expected), ", got ", dtype_text(t.scalar_type()));
}

// -1 in `expected` allows any size.
inline void check_shape(const Tensor& t, const char* name, const char* letters,
                        std::initializer_list<int64_t> expected) {
  bool fits = t.dim() == static_cast<int64_t>(expected.size());
  int64_t dim = 0;
  for (int64_t size : expected) {
    fits = fits && (size < 0 || t.size(dim) == size);
    ++dim;
  }
  if (fits) return;
  std::string wanted;
  for (int64_t size : expected) wanted += (wanted.empty() ? "" : ", ") + (size < 0 ? "any" : std::to_string(size));
  fail(name, " must have shape ", letters, " = [", wanted, "], got ", shape_text(t));
}

inline void check_rows_contiguous(const Tensor& t, const char* name) {
  check(t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1, name,
        " must be contiguous in its last dimension, got stride ", t.stride(t.dim() - 1));
}

// Memory that CUDA kernels copy 16 bytes at a time.
inline void check_cuda_rows(const Tensor& t, const char* name) {
  const auto element = static_cast<int64_t>(t.element_size());
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim + 1 < t.dim(); ++dim) {
    aligned = aligned && (t.size(dim) <= 1 || t.stride(dim) * element % 16 == 0);
  }
  check(aligned, name, ": on CUDA every row must begin at a multiple of 16 bytes; this is a slice that does not");
}

// Sizes and counts: kernels hold them in 32 bits.
inline int32_t size32(int64_t value, const char* name) {
  check(value >= 0 && value <= INT32_MAX, name, " must be in [0, 2^31), got ", value);
  return static_cast<int32_t>(value);
}

// Factors that kernels hold in float32.
inline float finite32(double value, const char* name) {
  const auto rounded = static_cast<float>(value);
  check(std::isfinite(rounded), name, std::isfinite(value) ? " must be finite in float32" : " must be finite", ", got ",
        value);
  return rounded;
}

template <class T>
const T* optional_data(const OptionalTensor& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// A whole argument that kernels read as a plain array.
inline void check_array(const Tensor& t, const char* name, const Tensor& first, ScalarType dtype, const char* letters,
                        std::initializer_list<int64_t> shape) {
  check_device(t, name, first);
  check_dtype(t, name, dtype);
  check_shape(t, name, letters, shape);
  check(t.is_contiguous(), name, " must be contiguous");
}

inline DType float_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: fail(name, " must be float32, bfloat16 or float16, got ", dtype_text(t.scalar_type()));
  }
}

}  // namespace lpd::checks
