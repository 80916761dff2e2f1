// What every operator that writes to an argument does about it: as torch's own in-place operators do, it refuses memory
// that is written twice or read and written, and tells autograd.
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

// Of all tensors of a call: one that is written must not share a byte with another one or with itself; and none may
// require grad where autograd records, because it would record nothing of what is written.
void check_written(std::initializer_list<Argument> arguments);

// Once nothing can be refused any more: counts up the version of each tensor, by which a backward pass knows that what
// it kept was changed.
void mark_written(std::initializer_list<Argument> arguments);

}  // namespace lpd::checks
