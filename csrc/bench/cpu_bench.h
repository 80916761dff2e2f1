// Shared by the CPU microbenchmarks: buffers, and the work of one call, which cpu_bench.cpp registers, splits over
// threads and times beside the processor's peak.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <utility>
#include <vector>

#include "bench_shapes.h"
#include "common/cpu_kernels.h"
#include "common/dtype.h"

namespace lpd::bench {

// Buffers begin at a cache line, as torch's do.
template <class T>
struct CacheLineAllocator {
  using value_type = T;
  CacheLineAllocator() = default;
  template <class U>
  CacheLineAllocator(const CacheLineAllocator<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* data, size_t) { ::operator delete(data, std::align_val_t{64}); }
  friend bool operator==(CacheLineAllocator, CacheLineAllocator) { return true; }
  friend bool operator!=(CacheLineAllocator, CacheLineAllocator) { return false; }
};

using Floats = std::vector<float, CacheLineAllocator<float>>;

// Normally distributed values, which begin again after a prime number of them.
inline Floats random_floats(int64_t count) {
  static const std::vector<float> period = [] {
    std::mt19937 generator(0);
    std::normal_distribution<float> normal;
    std::vector<float> values(65537);
    for (float& value : values) value = normal(generator);
    return values;
  }();
  Floats values(static_cast<size_t>(count));
  for (size_t i = 0, from = 0; i < values.size(); ++i, from = from + 1 < period.size() ? from + 1 : 0) {
    values[i] = period[from];
  }
  return values;
}

using Bfloats = std::vector<uint16_t, CacheLineAllocator<uint16_t>>;

inline Bfloats random_bfloats(int64_t count) {
  const Floats values = random_floats(count);
  Bfloats rounded(values.size());
  for (size_t i = 0; i < values.size(); ++i) rounded[i] = from_float<BFloat16>(values[i]).bits;
  return rounded;
}

// One call of an operator.
struct Work {
  std::function<void(int64_t begin, int64_t end)> kernel;  // keeps its buffers alive
  int64_t items = 0;
  double bytes = 0;  // the least the call moves
  double flops = 0;  // not 0: what limits it is arithmetic, else the memory
};

// `data` is what `params` point to; the kernel is that of the instruction set in use.
template <class Params, class Data>
Work make_work(void (*kernel)(const Params&, int64_t, int64_t), const Params& params, std::shared_ptr<Data> data,
               int64_t items) {
  Work work;
  work.items = items;
  work.kernel = [kernel, params, data = std::move(data)](int64_t begin, int64_t end) { kernel(params, begin, end); };
  return work;
}

// One per operator, each in its <stem>_cpu_bench.cpp; fp32 but for packed_linear_int8, whose FLOP are of bytes, and for
// normed_linear, residual_linear and fold_layer_norm, which take bf16.
Work group_attention_work(const Shape& shape, int32_t batch);
Work append_kv_work(const Shape& shape, int32_t batch);
Work embed_rows_work(const Shape& shape, int32_t batch);
Work residual_layer_norm_work(const Shape& shape, int32_t batch);
Work sample_tokens_work(const Shape& shape, int32_t batch);           // filters off
Work sample_tokens_filtered_work(const Shape& shape, int32_t batch);  // top-k 900, top-p 0.95
Work sample_step_work(const Shape& shape, int32_t batch);
Work sample_step_filtered_work(const Shape& shape, int32_t batch);
Work packed_linear_work(const Shape& shape, int32_t batch);  // fc1, rows packed beforehand
Work packed_linear_int8_work(const Shape& shape, int32_t batch);
Work normed_linear_work(const Shape& shape, int32_t batch);    // fc1
Work residual_linear_work(const Shape& shape, int32_t batch);  // proj
Work fold_layer_norm_work();                                   // fc1
Work locality_order_work(const Schedule& schedule);            // one order

}  // namespace lpd::bench
