#include "written.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>

#include "checks.h"

namespace lpd::checks {
namespace {

constexpr int kMaxDims = 8;

// The bytes of a tensor; its dimensions of one element left out, the others by falling stride.
struct Memory {
  struct Dim {
    int64_t stride;  // in bytes
    int64_t last;    // index
  };
  int64_t begin, element;  // an element's first byte, and its bytes
  int64_t reach;           // from the first element to the last
  int num_dims;            // -1: no elements
  Dim dims[kMaxDims];
};

Memory memory_of(const Tensor& t, const char* name) {
  Memory memory{};
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  check(sizes.size() <= kMaxDims, name, " must have at most ", kMaxDims, " dimensions, got ", sizes.size());
  memory.element = static_cast<int64_t>(t.element_size());
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    if (sizes[dim] == 0) return memory.num_dims = -1, memory;
    if (sizes[dim] == 1) continue;
    const Memory::Dim added{strides[dim] * memory.element, sizes[dim] - 1};
    int at = memory.num_dims++;
    for (; at > 0 && memory.dims[at - 1].stride < added.stride; --at) memory.dims[at] = memory.dims[at - 1];
    memory.dims[at] = added;
    memory.reach += added.stride * added.last;
  }
  memory.begin = static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.const_data_ptr()));
  return memory;
}

// Whether each dimension steps over all that the ones of smaller strides cover, as in a slice of a larger tensor.
bool is_nested(const Memory& memory) {
  int64_t covered = memory.element;
  for (int dim = memory.num_dims - 1; dim >= 0; --dim) {
    if (memory.dims[dim].stride < covered) return false;
    covered += memory.dims[dim].stride * memory.dims[dim].last;
  }
  return true;
}

// Whether two tensors have a byte in common, for instance not if they are interleaved slices of one buffer: is there an
// element of each such that their distance is smaller than an element? Equal strides of the two are one step, taken
// forwards by one tensor and backwards by the other; the search tries only steps after which the smaller ones still can
// reach, which are two or three if the strides are nested.
class CommonByte {
 public:
  CommonByte(const Memory& a, const Memory& b) : least_(1 - b.element), most_(a.element - 1) {
    int i = 0, j = 0;
    while (i < a.num_dims || j < b.num_dims) {
      const int64_t stride_a = i < a.num_dims ? a.dims[i].stride : -1;
      const int64_t stride_b = j < b.num_dims ? b.dims[j].stride : -1;
      const int64_t stride = std::max(stride_a, stride_b);
      steps_[count_++] = {stride, stride_a == stride ? a.dims[i++].last : 0, stride_b == stride ? b.dims[j++].last : 0};
    }
    exists_ = search(0, b.begin - a.begin, a.reach, b.reach);
  }

  bool exists() const { return exists_; }

 private:
  struct Step {
    int64_t stride, last_a, last_b;
  };

  // distance: from the element of a to that of b so far; back, ahead: what the remaining steps can still change it by.
  bool search(int at, int64_t distance, int64_t back, int64_t ahead) {
    if (distance - back > most_ || distance + ahead < least_) return false;
    if (at == count_) return true;
    if (--tries_ < 0) return true;  // strides without any order: better refused than computed wrongly
    const Step& step = steps_[at];
    if (step.stride == 0) return search(at + 1, distance, back, ahead);
    back -= step.stride * step.last_a;
    ahead -= step.stride * step.last_b;
    const int64_t first = std::max(-step.last_a, (least_ - ahead - distance) / step.stride - 1);
    const int64_t last = std::min(step.last_b, (most_ + back - distance) / step.stride + 1);
    for (int64_t n = first; n <= last && tries_ >= 0; ++n) {
      if (search(at + 1, distance + n * step.stride, back, ahead)) return true;
    }
    return tries_ < 0;
  }

  int64_t least_, most_;
  int count_ = 0, tries_ = 1000;
  bool exists_ = false;
  std::array<Step, 2 * kMaxDims> steps_;
};

bool share_memory(const Memory& a, const Memory& b) {
  if (a.num_dims < 0 || b.num_dims < 0) return false;
  if (a.begin + a.reach + a.element <= b.begin || b.begin + b.reach + b.element <= a.begin) return false;
  return CommonByte(a, b).exists();
}

// The ABI has no question for it, but in grad mode an alias is a part of the graph if the tensor requires grad.
bool is_recorded(const Tensor& t) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(t)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::alias", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor alias = torch::stable::detail::to<Tensor>(stack[0]);
  stack[0] = torch::stable::detail::from(alias);
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::is_leaf", "", stack.data(), TORCH_ABI_VERSION));
  return !torch::stable::detail::to<bool>(stack[0]);
}

// Nothing that is written gets a gradient, so none may be expected: torch refuses it so where results go to `out`.
void check_gradients(std::initializer_list<Argument> arguments) {
  const auto is_written = [](const Argument& argument) { return argument.written && argument.tensor != nullptr; };
  const Argument* target = std::find_if(arguments.begin(), arguments.end(), is_written);
  if (target == arguments.end() || !aoti_torch_grad_mode_is_enabled()) return;
  for (const Argument& argument : arguments) {
    check(argument.tensor == nullptr || !is_recorded(*argument.tensor), argument.name, " requires grad, but ",
          argument.written ? "it" : target->name, " is written without a gradient: use torch.no_grad()");
  }
}

}  // namespace

void check_written(std::initializer_list<Argument> arguments) {
  constexpr size_t kMaxArguments = 16;
  std::array<Memory, kMaxArguments> memory;
  check(arguments.size() <= kMaxArguments, "check_written: too many arguments");
  size_t index = 0;
  for (const Argument& argument : arguments) {
    Memory& own = memory[index++];
    own.num_dims = -1;
    if (argument.tensor == nullptr) continue;
    own = memory_of(*argument.tensor, argument.name);
    if (!argument.written) continue;
    if (own.num_dims < 0 || is_nested(own)) continue;
    fail(argument.name, " is written, so its elements must not overlap, got shape ", shape_text(*argument.tensor),
         " and strides ", list_text(argument.tensor->strides()));
  }
  for (size_t i = 0; i < arguments.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      const Argument &a = arguments.begin()[i], &b = arguments.begin()[j];
      if (!a.written && !b.written) continue;
      check(!share_memory(memory[i], memory[j]), (a.written ? a : b).name,
            " is written, so it must not share memory with ", (a.written ? b : a).name);
    }
  }
  check_gradients(arguments);
}

void mark_written(std::initializer_list<Argument> arguments) {
  for (const Argument& argument : arguments) {
    // Copying a tensor to itself does nothing but what every in-place operator of torch does besides its work.
    if (argument.tensor == nullptr || !argument.written) continue;
    check(aoti_torch_copy_(argument.tensor->get(), argument.tensor->get(), 0) == AOTI_TORCH_SUCCESS, argument.name,
          " is written, so outside torch.inference_mode() it must not be an inference tensor");
  }
}

}  // namespace lpd::checks
