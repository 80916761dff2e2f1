// Checks for operators that write to an argument: like torch's in-place operators, they refuse memory that is written
// twice or both read and written, and tell autograd.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

namespace lpd::checks {

struct Argument {
  const torch::stable::Tensor* tensor;  // nullptr: not given
  const char* name;
  bool written;
};

inline Argument written(const torch::stable::Tensor& t, const char* name) { return {&t, name, true}; }
inline Argument written(const std::optional<torch::stable::Tensor>& t, const char* name) {
  return {t.has_value() ? &*t : nullptr, name, true};
}
inline Argument read(const torch::stable::Tensor& t, const char* name) { return {&t, name, false}; }
inline Argument read(const std::optional<torch::stable::Tensor>& t, const char* name) {
  return {t.has_value() ? &*t : nullptr, name, false};
}

// Checks all tensors of a call: a written one must not share a byte with another one or with itself, and none may
// require grad while autograd records, since the writing would not be recorded.
void check_written(std::initializer_list<Argument> arguments);

// Counts up the version of each tensor, once all checks have passed: by it a backward pass notices that a tensor it
// saved has changed.
void mark_written(std::initializer_list<Argument> arguments);

}  // namespace lpd::checks
