// Runs the CUDA kernels of one operator on random small inputs, without torch, so that sanitizers can watch: each case
// in three thread orders, whose outputs must be the same bits, and against the CPU kernel.
//
// Usage: kernel_driver OPERATOR [once | few], or kernel_driver unknown_dtype, for what all do with one. For sanitizers,
// which are slow and do not depend on the order: with `once` one order, for the address sanitizer; with `few` one order
// and fewer cases, for the thread sanitizer. Exit status 1: outputs differ; 86: the emulator stopped a kernel.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/cpu_kernels.h"
#include "common/ptx.cuh"
#include "emulator.h"
#include "operator_params.h"

namespace lpd {
namespace {

using emulator::Order;

bool few = false;
bool once = false;
std::mt19937 generator(1);
constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr int32_t kPadding = 8;  // elements between rows, where a stride can be given: a multiple of 16 bytes

int32_t any_of(int32_t low, int32_t high) { return std::uniform_int_distribution<int32_t>(low, high)(generator); }

// As a GPU aligns its allocations.
template <class T>
struct DeviceAllocator {
  using value_type = T;
  static constexpr std::align_val_t kAlignment{256};
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kAlignment)); }
  void deallocate(T* data, size_t) { ::operator delete(data, kAlignment); }
  bool operator==(const DeviceAllocator&) const { return true; }
  bool operator!=(const DeviceAllocator&) const { return false; }
};

// Zeroed. Made with its final size, so that AddressSanitizer knows where it ends.
template <class T>
using Array = std::vector<T, DeviceAllocator<T>>;
using Bytes = Array<uint8_t>;

size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

float element(const Bytes& array, DType dtype, size_t i) {
  return dispatch_dtype(dtype,
                        [&](auto type) { return to_float(reinterpret_cast<const decltype(type)*>(array.data())[i]); });
}

Bytes zeros(int64_t count, DType dtype) { return Bytes(static_cast<size_t>(count) * size_of(dtype)); }

Bytes random_elements(int64_t count, DType dtype) {
  Bytes array = zeros(count, dtype);
  dispatch_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) reinterpret_cast<T*>(array.data())[i] = from_float<T>(normal(generator));
  });
  return array;
}

template <class T>
Array<T> on_device(const std::vector<T>& values) {
  return Array<T>(values.begin(), values.end());
}

template <class T>
Bytes bytes_of(const Array<T>& array) {
  Bytes bytes(array.size() * sizeof(T));
  std::memcpy(bytes.data(), array.data(), bytes.size());
  return bytes;
}

struct Output {
  const char* name;
  Bytes bytes;
  std::optional<DType> rounded = {};  // if given, elements of this type, which the CPU may round otherwise
};
using Outputs = std::vector<Output>;

bool close(const Bytes& found, const Bytes& wanted, DType dtype) {
  const size_t count = wanted.size() / size_of(dtype);
  float largest = 0.0f;
  for (size_t i = 0; i < count; ++i) largest = std::fmax(largest, std::fabs(element(wanted, dtype, i)));
  const float allowed = (dtype == DType::kFloat32 ? 1e-5f : 0.02f) * largest;
  for (size_t i = 0; i < count; ++i) {
    if (!(std::fabs(element(found, dtype, i) - element(wanted, dtype, i)) <= allowed)) return false;
  }
  return true;
}

// Compares an operator's kernels for the CPU and CUDA. `compute(run)` makes room for the outputs, lets `p` point there,
// calls run(), which is one of the two, and returns what it wrote.
template <class Params, class Compute>
void check(void (*on_cpu)(const Params&, int64_t, int64_t), int64_t items, void (*on_cuda)(const Params&, void*),
           const Params& p, const Compute& compute) {
  const auto require = [](bool holds, const char* output, const char* than) {
    if (holds) return;
    std::fprintf(stderr, "%s differs %s\n", output, than);
    std::exit(1);
  };
  const Outputs wanted = compute([&] { on_cpu(p, 0, items); });
  Outputs first;
  for (Order order : {Order::kAscending, Order::kDescending, Order::kRandom}) {
    emulator::settings().order = order;
    emulator::settings().seed = 7;
    const Outputs found = compute([&] { on_cuda(p, nullptr); });
    if (first.empty()) first = found;
    for (size_t i = 0; i < found.size(); ++i) {
      const auto& [name, bytes, rounded] = found[i];
      require(bytes == first[i].bytes, name, "in another order of threads");
      const bool agrees = rounded ? close(bytes, wanted[i].bytes, *rounded) : bytes == wanted[i].bytes;
      require(agrees, name, "from the CPU's");
    }
    if (once) return;
  }
}

// What an operator reads, but for weights, was written by the launch before, and what it writes is still in use there:
// from 9.0 on it has to wait for the end of that.
struct Written {
  struct {
    uint8_t* data;
    size_t bytes;
  } arrays[12];
};
void rewrite_kernel(const Written written) {
  ptx::follow_launch_before();
  for (const auto& [data, bytes] : written.arrays) {
    for (size_t at = 8 * threadIdx.x; at + 8 <= bytes; at += 8 * 32) {
      store_vector(data + at, load_vector<uint2>(data + at));
    }
  }
}
template <class... Arrays>
void write_in_the_launch_before(Arrays&... arrays) {
  emulator::settings().launches_follow = true;
  const Written written{{{reinterpret_cast<uint8_t*>(arrays.data()), arrays.size() * sizeof(arrays[0])}...}};
  launch("rewrite", rewrite_kernel, dim3(1), dim3(32), 0, nullptr, written);
}

// A decoding step of ragged sequences, for group_attention and append_kv.
struct Step {
  Step(const std::vector<bench::SequenceSizes>& sizes, DType dtype_, int32_t head_dim_)
      : dtype(dtype_), head_dim(head_dim_), segments(on_device(bench::make_segments(sizes, 1))) {
    for (Segment& segment : segments) {
      segment.cache_slot = static_cast<int32_t>(sizes.size()) - segment.cache_slot;
      const int32_t step_rows = segment.num_context + segment.num_query;
      first_query += segment.num_context;
      rows = segment.query_start + segment.num_query;
      max_rows = std::max(max_rows, step_rows);
      max_keys = std::max(max_keys, step_rows + segment.cache_length);
      positions = std::max(positions, segment.num_context + segment.cache_length);
    }
    const auto slots = static_cast<int64_t>(sizes.size()) + 1;
    qkv = random_elements(rows * row_stride(), dtype);
    k_cache = random_elements(slots * slot_stride(), dtype);
    v_cache = random_elements(slots * slot_stride(), dtype);
    // NaN where nobody may look: in a row of no segment, and behind what is cached.
    std::memset(qkv.data(), 0xff, static_cast<size_t>(row_stride()) * size_of(dtype));
    const size_t row_bytes = static_cast<size_t>(head_dim + kPadding) * size_of(dtype);
    for (const Segment& segment : segments) {
      for (int32_t i = 0; i < positions * kHeads; ++i) {
        if (i % positions < segment.cache_length) continue;
        const size_t row = static_cast<size_t>(segment.cache_slot * kHeads * positions + i);
        for (Bytes* cache : {&k_cache, &v_cache}) std::memset(cache->data() + row * row_bytes, 0xff, row_bytes);
      }
    }
  }

  CacheRows params() const {
    return bench::cache_rows(*this, {static_cast<int32_t>(segments.size()), kHeads, head_dim, positions}, max_rows,
                             dtype, kPadding);
  }

  static constexpr int32_t kHeads = 2;
  DType dtype;
  int32_t head_dim, first_query = 1, rows = 0, positions = 0, max_rows = 0, max_keys = 0;
  Array<Segment> segments;
  Bytes qkv, k_cache, v_cache;

 private:
  int64_t row_stride() const { return 3 * kHeads * head_dim + kPadding; }
  int64_t slot_stride() const { return int64_t{kHeads} * positions * (head_dim + kPadding); }
};

const std::vector<bench::SequenceSizes> kManyKinds = {{3, 5, 7}, {4, 0, 0},    {0, 6, 9},
                                                      {0, 0, 5}, {16, 17, 80}, {1, 33, 0}};
const std::vector<bench::SequenceSizes> kManyTiles = {{70, 9, 40}, {3, 64, 130}};
const std::vector<bench::SequenceSizes> kManyKeys = {{5, 3, 300}, {2, 0, 5}, {0, 7, 64}};  // split over blocks
const std::vector<bench::SequenceSizes> kTileEdges = {{3, 2, 63}, {2, 1, 127}, {1, 5, 159}};
const std::vector<bench::SequenceSizes> kTwoTiles = {{3, 20, 70}, {2, 0, 5}};
const std::vector<bench::SequenceSizes> kThreeSegments = {{1, 2, 3}, {2, 0, 5}, {1, 1, 66}};

enum class Splits { kNone, kInWorkspace, kInClusters };

void attend(const Step& step, int32_t first_output_row, Splits splits) {
  GroupAttentionParams p = bench::group_attention_params(step.params(), step.max_keys, 0.2f);
  p.first_output_row = first_output_row;
  const bool clusters = splits == Splits::kInClusters;
  p.settled = step.head_dim != 32;
  const bool in_turns = splits == Splits::kNone && first_output_row == 1;  // more blocks than run at once
  const int32_t multiprocessors = in_turns ? 1 : clusters ? 132 : 108;
  emulator::settings().multiprocessors = multiprocessors;
  emulator::settings().compute_capability = clusters || in_turns ? 90 : 80;
  // Zeroed where it has to be. Counters are back at zero after a launch, or the next one differs. Clusters use none.
  Bytes workspace(static_cast<size_t>(clusters ? 1 : group_attention_workspace_bytes(step.head_dim, multiprocessors)),
                  0xff);
  if (!clusters) std::memset(workspace.data(), 0, static_cast<size_t>(group_attention_counter_bytes(multiprocessors)));
  if (splits != Splits::kNone) {
    p.workspace = workspace.data();
    p.workspace_bytes = static_cast<int64_t>(workspace.size());
  }
  check(cpu_kernels().group_attention, group_attention_items(p), launch_group_attention, p,
        [&](const auto& run) -> Outputs {
          Bytes qkv = step.qkv, k = step.k_cache, v = step.v_cache;
          Bytes output = zeros((step.rows - first_output_row) * Step::kHeads * step.head_dim, step.dtype);
          p.qkv = qkv.data();
          p.k_cache = k.data();
          p.v_cache = v.data();
          p.output = output.data();
          if (p.settled) {
            write_in_the_launch_before(qkv, output);
          } else {
            write_in_the_launch_before(qkv, k, v, output);
          }
          run();
          return {{"K cache", k}, {"V cache", v}, {"output", output, step.dtype}};
        });
}

void group_attention() {
  if (few) {
    attend(Step(kTwoTiles, DType::kFloat32, 32), 1, Splits::kInWorkspace);
    attend(Step(kTwoTiles, DType::kFloat16, 64), 1, Splits::kInWorkspace);
    attend(Step(kTwoTiles, DType::kBFloat16, 64), 2, Splits::kNone);
    attend(Step(kThreeSegments, DType::kBFloat16, 64), 1, Splits::kNone);
    attend(Step(kTwoTiles, DType::kFloat32, 32), 1, Splits::kInClusters);
    attend(Step(kTwoTiles, DType::kFloat16, 64), 1, Splits::kInClusters);
    return;
  }
  for (DType dtype : kDTypes) {
    for (int32_t head_dim : {32, 64, 128}) {
      for (const auto* sizes : {&kManyKinds, &kManyTiles, &kManyKeys, &kTileEdges}) {
        if (sizes != &kManyKinds && head_dim != 64) continue;
        const Step step(*sizes, dtype, head_dim);
        for (int32_t first_output_row : {1, step.first_query}) {
          for (Splits splits : {Splits::kNone, Splits::kInWorkspace, Splits::kInClusters}) {
            attend(step, first_output_row, splits);
          }
        }
      }
    }
  }
}

void append_kv() {
  for (DType dtype : kDTypes) {
    for (int32_t head_dim : {32, 128}) {
      const Step step(few ? kTwoTiles : head_dim == 32 ? kManyTiles : kManyKinds, dtype, head_dim);
      AppendKvParams p = step.params();
      check(cpu_kernels().append_kv, append_kv_items(p), launch_append_kv, p, [&](const auto& run) -> Outputs {
        emulator::settings().compute_capability = 90;
        Bytes qkv = step.qkv, k = step.k_cache, v = step.v_cache;
        p.qkv = qkv.data();
        p.k_cache = k.data();
        p.v_cache = v.data();
        write_in_the_launch_before(qkv, k, v);
        run();
        return {{"K cache", k}, {"V cache", v}};
      });
    }
  }
}

void embed_rows() {
  emulator::settings().compute_capability = 90;
  constexpr int64_t kRows = 3, kContents = 11, kPositions = 7;
  for (DType dtype : kDTypes) {
    for (int32_t width : {8, 32, 100, 272, 1056}) {
      const int64_t stride = width + kPadding;
      struct {
        Bytes content, position_embedding, weight, bias, scale;
        Array<int64_t> content_ids = Array<int64_t>(kRows), positions = content_ids;
      } arrays{random_elements(kContents * stride, dtype), random_elements(kPositions * stride, dtype),
               random_elements(width, dtype), random_elements(width, dtype), random_elements(width, dtype)};
      for (int64_t& id : arrays.content_ids) id = any_of(0, kContents - 1);
      for (int64_t& position : arrays.positions) position = any_of(0, kPositions - 1);
      EmbedRowsParams p = bench::embed_rows_params(arrays, kRows, kContents, kPositions, width, dtype, kPadding);
      check(cpu_kernels().embed_rows, kRows, launch_embed_rows, p, [&](const auto& run) -> Outputs {
        Bytes x = zeros(kRows * width, DType::kFloat32);
        p.x = reinterpret_cast<float*>(x.data());
        write_in_the_launch_before(arrays.content_ids, arrays.positions, x);
        run();
        return {{"x", x, DType::kFloat32}};
      });
      if (dtype == DType::kFloat32 || width % kStatisticsColumns != 0) continue;
      p.scale = arrays.scale.data();
      check(cpu_kernels().embed_rows, kRows, launch_embed_rows, p, [&](const auto& run) -> Outputs {
        Bytes x = zeros(kRows * width, DType::kFloat32), scaled = zeros(kRows * width, dtype);
        Bytes statistics = zeros(kRows * width / kStatisticsColumns * 2, DType::kFloat32);
        p.x = reinterpret_cast<float*>(x.data());
        p.scaled = scaled.data();
        p.statistics = reinterpret_cast<float*>(statistics.data());
        write_in_the_launch_before(arrays.content_ids, x, scaled, statistics);
        run();
        return {{"x", x, DType::kFloat32}, {"scaled", scaled, dtype}, {"statistics", statistics, DType::kFloat32}};
      });
    }
  }
}

void residual_layer_norm() {
  emulator::settings().compute_capability = 90;
  constexpr int64_t kRows = 3;
  for (DType dtype : kDTypes) {
    for (int32_t width : {8, 100, 272, 1024}) {
      for (bool has_delta : {false, true}) {
        const int64_t stride = width + kPadding;
        const Bytes x_before = random_elements(kRows * stride, DType::kFloat32);
        struct {
          Bytes delta, weight, bias;
        } arrays{random_elements(kRows * stride, dtype), random_elements(width, dtype), random_elements(width, dtype)};
        ResidualLayerNormParams p = bench::residual_layer_norm_params(arrays, kRows, width, dtype, kPadding);
        if (!has_delta) p.delta = nullptr;
        check(cpu_kernels().residual_layer_norm, kRows, launch_residual_layer_norm, p, [&](const auto& run) -> Outputs {
          Bytes x = x_before, normed = zeros(kRows * width, dtype);
          p.x = reinterpret_cast<float*>(x.data());
          p.normed = normed.data();
          write_in_the_launch_before(x, arrays.delta, normed);
          run();
          return {{"x", x}, {"normed", normed, dtype}};
        });
      }
    }
  }
}

// One slab of K and many, of which a part or all lies in shared memory at a time; clusters, of which blocks have some.
struct ProductSizes {
  int32_t rows, features, depth;
  int32_t multiprocessors = 132;  // with few, blocks have several warps of features
};
std::vector<ProductSizes> product_sizes() {
  const ProductSizes several_of_all{83, 64, 512, 4};  // warps of features and of K, blocks of a cluster, tiles of rows
  if (few) return {several_of_all};
  return {several_of_all, {1, 32, 32}, {20, 96, 192, 4}, {170, 64, 768, 4}, {5, 64, 5120}, {100, 160, 1344}};
}

// In one order of threads on another device, whose blocks share the work otherwise: that must not change a bit either.
void on_device_with_clusters(int32_t multiprocessors) {
  const bool is_other = emulator::settings().order == Order::kDescending;
  emulator::settings().multiprocessors = is_other ? 300 : multiprocessors;
  emulator::settings().compute_capability = 90;
}

struct ProductArrays {
  ProductArrays(const ProductSizes& sizes, DType dtype)
      : rows(random_elements(int64_t{sizes.rows} * (sizes.depth + kPadding), dtype)),
        weight(random_elements(int64_t{sizes.features} * (sizes.depth + kPadding), dtype)) {}
  Bytes rows, weight;
};

void residual_linear() {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const ProductSizes& sizes : product_sizes()) {
      const auto [rows, features, depth, multiprocessors] = sizes;
      ProductArrays arrays(sizes, dtype);
      const Bytes bias = random_elements(features, dtype), scale = random_elements(features, dtype);
      const Bytes x_before = random_elements(int64_t{rows} * (features + kPadding), DType::kFloat32);
      ResidualLinearParams p{};
      static_cast<FewRowProduct&>(p) = bench::few_row_product(arrays, rows, features, depth, dtype, kPadding);
      p.bias = rows == 1 ? nullptr : bias.data();
      p.scale = scale.data();
      p.x_stride = features + kPadding;
      check(cpu_kernels().residual_linear, rows, launch_residual_linear, p, [&](const auto& run) -> Outputs {
        on_device_with_clusters(multiprocessors);
        Bytes x = x_before, scaled = zeros(int64_t{rows} * features, dtype);
        Bytes statistics = zeros(int64_t{rows} * features / 16, DType::kFloat32);
        p.x = reinterpret_cast<float*>(x.data());
        p.scaled = scaled.data();
        p.statistics = reinterpret_cast<float*>(statistics.data());
        write_in_the_launch_before(arrays.rows, x, scaled, statistics);
        run();
        return {{"x", x, DType::kFloat32}, {"scaled", scaled, dtype}, {"statistics", statistics, DType::kFloat32}};
      });
    }
  }
}

void normed_linear() {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    std::vector<ProductSizes> all = product_sizes();
    if (!few) all.insert(all.end(), {{7, 200, 96}, {18, 8200, 320}});
    for (const ProductSizes& sizes : all) {
      const auto [rows, features, depth, multiprocessors] = sizes;
      ProductArrays arrays(sizes, dtype);
      Bytes slope = random_elements(features, DType::kFloat32), shift = random_elements(features, DType::kFloat32);
      Bytes statistics = random_elements(int64_t{rows} * depth / 16, DType::kFloat32);
      float* const values = reinterpret_cast<float*>(statistics.data());
      for (int32_t i = 1; i < rows * depth / 16; i += 2) values[i] = 32.0f + std::fabs(values[i]);
      NormedLinearParams p{};
      static_cast<FewRowProduct&>(p) = bench::few_row_product(arrays, rows, features, depth, dtype, kPadding);
      p.statistics = values;
      p.slope = reinterpret_cast<const float*>(slope.data());
      p.shift = reinterpret_cast<const float*>(shift.data());
      p.eps = 1e-6f;
      p.gelu = rows % 2 == 0;
      check(cpu_kernels().normed_linear, rows, launch_normed_linear, p, [&](const auto& run) -> Outputs {
        on_device_with_clusters(multiprocessors);
        Bytes output = zeros(int64_t{rows} * features, dtype);
        p.output = output.data();
        write_in_the_launch_before(arrays.rows, statistics, slope, shift, output);
        run();
        return {{"output", output, dtype}};
      });
    }
  }
}

void fold_layer_norm() {
  emulator::settings().compute_capability = 90;
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const auto& [features, depth] : {std::pair{1, 32}, {7, 96}, {20, 1344}}) {
      const ProductArrays arrays({1, features, depth}, dtype);
      const Bytes beta = random_elements(depth, dtype), bias = random_elements(features, dtype);
      FoldLayerNormParams p{};
      p.weight = arrays.weight.data();
      p.gamma = arrays.rows.data();
      p.beta = beta.data();
      p.bias = features == 1 ? nullptr : bias.data();
      p.weight_stride = depth + kPadding;
      p.num_features = features;
      p.depth = depth;
      p.dtype = dtype;
      check(cpu_kernels().fold_layer_norm, features, launch_fold_layer_norm, p, [&](const auto& run) -> Outputs {
        Bytes slope = zeros(features, DType::kFloat32), shift = zeros(features, DType::kFloat32);
        p.slope = reinterpret_cast<float*>(slope.data());
        p.shift = reinterpret_cast<float*>(shift.data());
        write_in_the_launch_before(slope, shift);
        run();
        return {{"slope", slope, DType::kFloat32}, {"shift", shift, DType::kFloat32}};
      });
    }
  }
}

// The same tokens as those of two images, the second with a twin; the tables are as small as they can be.
void sample_into_tables(SampleTokensParams p) {
  constexpr int64_t kImages = 2, kCells = 3, kColumns = kCells + 2;
  Array<int64_t> image, token_index, write_index, twin_index, positions((kImages + 1) * kColumns, 0);
  Array<float> guidance;
  Array<int32_t> conditional_row(p.conditional_row, p.conditional_row + p.num_tokens);
  Array<int32_t> unconditional_row(p.unconditional_row, p.unconditional_row + p.num_tokens);
  for (int64_t m = 0; m < kImages * kCells; ++m) {
    const int64_t b = m / kCells, n = m % kCells;
    image.push_back(b);
    token_index.push_back(n);
    write_index.push_back(b * kColumns + 1 + n);
    twin_index.push_back(b == 0 ? -1 : (b + 1) * kColumns + 1 + n);
    positions[b * kColumns + 1 + n] = 1 + (n + 1) % kCells;
    guidance.push_back(1.0f + static_cast<float>(m));
  }
  p.guidance = guidance.data();
  p.guidance_stride = kCells;
  p.conditional_row = conditional_row.data();
  p.unconditional_row = unconditional_row.data();
  // Of a last token that has a row or an entry outside, which only the CUDA kernel looks at, nothing is drawn.
  struct Entry {
    std::function<int64_t(int64_t)> exchange;  // returns what was there before
    int64_t outside;
  };
  const auto entry = [](auto& table, int64_t at) {
    using Value = std::decay_t<decltype(table[at])>;
    return [&table, at](int64_t value) -> int64_t { return std::exchange(table[at], static_cast<Value>(value)); };
  };
  const int64_t last = p.num_tokens - 1;
  std::vector<Entry> entries{{entry(image, last), image[last]}};  // which is right
  if (p.vocab_size == 50) {
    entries.insert(entries.end(), {{entry(conditional_row, last), p.num_rows},
                                   {entry(conditional_row, last), -1},
                                   {entry(unconditional_row, last), p.num_rows},
                                   {entry(unconditional_row, last), -2},
                                   {entry(image, last), kImages},
                                   {entry(image, last), -1},
                                   {entry(token_index, last), kCells},
                                   {entry(write_index, last), -1},
                                   {entry(twin_index, last), (kImages + 1) * kColumns},
                                   {entry(positions, write_index[last]), 0},
                                   {entry(positions, write_index[last]), kCells + 1}});
  }
  for (const auto& [exchange, outside] : entries) {
    const int64_t right = exchange(outside), drawn = right == outside ? p.num_tokens : last;
    exchange(right);
    check(cpu_kernels().sample_tokens, drawn, launch_sample_tokens, p, [&](const auto& run) -> Outputs {
      Array<int64_t> contents(positions.size(), -1), grid(kImages * kCells, -1);
      p.tables = {image.data(),
                  token_index.data(),
                  write_index.data(),
                  twin_index.data(),
                  positions.data(),
                  contents.data(),
                  grid.data(),
                  kImages,
                  kCells,
                  static_cast<int64_t>(positions.size())};
      write_in_the_launch_before(image, token_index, write_index, twin_index, positions, contents, grid);
      exchange(outside);
      run();
      exchange(right);
      return {{"contents", bytes_of(contents)}, {"grid", bytes_of(grid)}};
    });
  }
}

// The CPU's tokens, since rounding decides one draw in many and seeds are fixed.
void sample_tokens() {
  emulator::settings().compute_capability = 90;
  constexpr int32_t kTokens = 6;
  for (DType dtype : kDTypes) {
    // A row in registers; in shared memory and, where some of it is filtered out, beyond.
    for (int32_t vocab : {1, 50, 1000, 16384, 26000}) {
      if (few && (vocab == 1 || (vocab > 1000 && dtype != DType::kBFloat16))) continue;
      const bench::SampledRows sampled(kTokens);
      struct {
        Bytes logits;
        Array<int32_t> conditional_row, unconditional_row;
        Array<int64_t> cell, seed = cell;
        Array<float> guidance = Array<float>(kTokens, 3.0f), temperature = Array<float>(kTokens, 0.7f);
        Array<int32_t> top_k = {0, 20, 20, 20, 20, 20};
        Array<float> top_p = {1.0f, 1.0f, 1.0f, 0.8f, 0.8f, 0.8f};
      } arrays{random_elements(2 * kTokens * (vocab + kPadding), dtype), on_device(sampled.conditional_row),
               on_device(sampled.unconditional_row), on_device(sampled.cell)};
      for (int64_t& seed : arrays.seed) seed = any_of(0, 1 << 30);
      arrays.unconditional_row[1] = -1;
      arrays.temperature[2] = 0.0f;
      for (bool filtered : {false, true}) {
        SampleTokensParams p = bench::sample_tokens_params(arrays, kTokens, vocab, filtered, filtered, dtype, kPadding);
        check(cpu_kernels().sample_tokens, kTokens, launch_sample_tokens, p, [&](const auto& run) -> Outputs {
          Array<int64_t> tokens(kTokens);
          p.tokens = tokens.data();
          write_in_the_launch_before(arrays.logits, tokens);
          run();
          return {{"tokens", bytes_of(tokens)}};
        });
      }
      sample_into_tables(bench::sample_tokens_params(arrays, kTokens, vocab, true, true, dtype, kPadding));
    }
  }
}

void locality_order() {
  emulator::settings().compute_capability = 90;
  constexpr int32_t kBatch = 3, kKnown = 10;
  struct Grid : bench::GridSizes {
    bool known;
    int32_t idle = 0;  // steps that draw nothing, so that no barrier comes between them
  };
  // On the long ones many cells are tied: for one warp, up to 256 cells, and for several.
  for (const Grid& grid :
       {Grid{{8, 8, 6, 1}, false}, Grid{{1, 13, 4, 2}, false}, Grid{{6, 9, 5, 1}, true}, Grid{{16, 17, 40, 2}, false},
        Grid{{1, 256, 5, 1}, false}, Grid{{256, 1, 5, 1}, false}, Grid{{1, 300, 5, 1}, false},
        Grid{{300, 1, 5, 1}, false}, Grid{{16, 17, 40, 2}, false, 34}}) {
    const int32_t cells = grid.height * grid.width, free = cells - (grid.known ? kKnown : 0);
    const auto drawn_before = [&](int32_t t) {
      const int32_t step = std::max(t - grid.idle, 0), steps = grid.steps - grid.idle;
      return free * step * (step + 1) / (steps * (steps + 1));
    };
    struct {
      Array<int32_t> group_sizes;  // ever larger
      Array<int64_t> seeds = Array<int64_t>(kBatch);
    } arrays;
    for (int32_t t = 0; t < grid.steps; ++t) arrays.group_sizes.push_back(drawn_before(t + 1) - drawn_before(t));
    Array<uint8_t> known(static_cast<size_t>(kBatch * cells));
    for (int32_t image = 0; image < kBatch; ++image) {
      arrays.seeds[static_cast<size_t>(image)] = any_of(0, 1 << 30);
      for (int32_t i = 0; i < cells - free; ++i) known[static_cast<size_t>(image * cells + 3 * i + image)] = 1;
    }
    LocalityOrderParams p = bench::locality_order_params(arrays, kBatch, grid);
    p.known = grid.known ? known.data() : nullptr;
    check(cpu_kernels().locality_order, kBatch, launch_locality_order, p, [&](const auto& run) -> Outputs {
      Array<int64_t> order(static_cast<size_t>(kBatch * cells));
      p.order = order.data();
      write_in_the_launch_before(arrays.seeds, known, order);
      run();
      return {{"order", bytes_of(order)}};
    });
  }
}

// Every kernel that is made for several dtypes refuses another, before it looks at an array.
void unknown_dtype() {
  const auto set = [](auto p) {
    p.dtype = static_cast<DType>(7);
    return p;
  };
  const auto require = [](const char* kernel, const auto& run) {
    try {
      run();
    } catch (const std::runtime_error& error) {
      if (std::string(error.what()) == "unknown dtype 7") return;
    }
    std::fprintf(stderr, "%s takes an unknown dtype\n", kernel);
    std::exit(1);
  };
  const auto on_cpu = [&](const char* name, auto kernel, const auto& p) { require(name, [&] { kernel(p, 0, 0); }); };
  const auto on_cuda = [&](const char* name, auto launch, const auto& p) {
    require(name, [&] { launch(p, nullptr); });
  };
  const CpuKernels& cpu = cpu_kernels();
  on_cpu("quantize_rows", cpu.quantize_rows, set(QuantizeRowsParams{}));
  on_cpu("training_attention", cpu.training_attention, set(TrainingAttentionParams{}));
  GroupAttentionParams attention{};
  attention.num_segments = attention.num_heads = attention.max_rows = 1;
  on_cpu("group_attention", cpu.group_attention, set(attention));
  on_cuda("group_attention on CUDA", launch_group_attention, set(attention));
  EmbedRowsParams embedding{};
  embedding.num_rows = embedding.width = 1;
  on_cpu("embed_rows", cpu.embed_rows, set(embedding));
  on_cuda("embed_rows on CUDA", launch_embed_rows, set(embedding));
  ResidualLayerNormParams norm{};
  norm.num_rows = norm.width = 1;
  on_cpu("residual_layer_norm", cpu.residual_layer_norm, set(norm));
  on_cuda("residual_layer_norm on CUDA", launch_residual_layer_norm, set(norm));
  SampleTokensParams sampling{};
  sampling.num_tokens = sampling.vocab_size = 1;
  on_cpu("sample_tokens", cpu.sample_tokens, set(sampling));
  on_cuda("sample_tokens on CUDA", launch_sample_tokens, set(sampling));
}

}  // namespace
}  // namespace lpd

int main(int count, char** arguments) {
  struct Operator {
    const char* name;
    void (*run)();
  };
  const Operator operators[] = {
      {"group_attention", lpd::group_attention}, {"append_kv", lpd::append_kv},
      {"embed_rows", lpd::embed_rows},           {"residual_layer_norm", lpd::residual_layer_norm},
      {"sample_tokens", lpd::sample_tokens},     {"locality_order", lpd::locality_order},
      {"residual_linear", lpd::residual_linear}, {"normed_linear", lpd::normed_linear},
      {"fold_layer_norm", lpd::fold_layer_norm}, {"unknown_dtype", lpd::unknown_dtype}};
  for (const Operator& each : operators) {
    if (count < 2 || std::strcmp(arguments[1], each.name) != 0) continue;
    lpd::few = count > 2 && std::strcmp(arguments[2], "few") == 0;
    lpd::once = lpd::few || (count > 2 && std::strcmp(arguments[2], "once") == 0);
    try {
      each.run();
    } catch (const std::runtime_error& error) {
      std::fprintf(stderr, "%s\n", error.what());
      return 86;
    }
    return 0;
  }
  std::fprintf(stderr, "usage: kernel_driver OPERATOR [once | few]\n");
  return 2;
}
