// Times launches that are recorded in a CUDA graph. Where the kernels are emulated they run once, by the clock: that
// says whether they work, not how fast they are.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "common/cuda.cuh"

namespace lpd::bench {

// Of kernels that may begin before the one before has ended: as they are, or made to wait for its end.
enum class Overlap { kAllowed, kForbidden };

#ifdef LPD_CUDA_EMULATED

constexpr bool kEmulated = true;

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t count, T value = {}) : values_(static_cast<size_t>(count), value) {}
  T* data() { return values_.data(); }
  std::vector<T> read() const { return values_; }

 private:
  std::vector<T> values_;
};

template <class Launches>
double seconds_of(const Launches& launches, Overlap = Overlap::kAllowed) {
  const auto begin = std::chrono::steady_clock::now();
  launches(nullptr);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

#else

constexpr bool kEmulated = false;

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "lpd_gpu_ceilings: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t count, T value = {}) : count_(static_cast<size_t>(count)) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    check(cudaMalloc(&data_, bytes + 1));
    // A megabyte at a time: the largest arrays would take as much of the host.
    const std::vector<T> part(std::min(static_cast<size_t>(count), (size_t{1} << 20) / sizeof(T)), value);
    for (size_t at = 0; at < bytes; at += part.size() * sizeof(T)) {
      const size_t length = std::min(part.size() * sizeof(T), bytes - at);
      check(cudaMemcpy(reinterpret_cast<char*>(data_) + at, part.data(), length, cudaMemcpyHostToDevice));
    }
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }
  T* data() { return data_; }
  std::vector<T> read() const {
    std::vector<T> values(count_);
    check(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

// Replaces the programmatic edges of a graph by full ones.
inline void forbid_overlap([[maybe_unused]] cudaGraph_t graph) {
#if CUDART_VERSION >= 12030
  size_t count = 0;
#if CUDART_VERSION >= 13000
  const auto get = cudaGraphGetEdges;
  const auto remove = cudaGraphRemoveDependencies;
  const auto add = cudaGraphAddDependencies;
#else
  const auto get = cudaGraphGetEdges_v2;
  const auto remove = cudaGraphRemoveDependencies_v2;
  const auto add = cudaGraphAddDependencies_v2;
#endif
  check(get(graph, nullptr, nullptr, nullptr, &count));
  std::vector<cudaGraphNode_t> from(count), to(count);
  std::vector<cudaGraphEdgeData> edges(count);
  check(get(graph, from.data(), to.data(), edges.data(), &count));
  const cudaGraphEdgeData full{};
  for (size_t i = 0; i < count; ++i) {
    if (edges[i].type != cudaGraphDependencyTypeProgrammatic) continue;
    check(remove(graph, &from[i], &to[i], &edges[i], 1));
    check(add(graph, &from[i], &to[i], &full, 1));
  }
#else
  std::fprintf(stderr, "lpd_gpu_ceilings: this CUDA cannot tell how kernels of a graph overlap\n");
#endif
}

// Median of replays.
template <class Launches>
double seconds_of(const Launches& launches, Overlap overlap = Overlap::kAllowed) {
  constexpr int kReplays = 15;
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  launches(stream);
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  launches(stream);
  check(cudaStreamEndCapture(stream, &graph));
  if (overlap == Overlap::kForbidden) forbid_overlap(graph);
  check(cudaGraphInstantiate(&replay, graph, 0));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> milliseconds;
  for (int i = 0; i < kReplays; ++i) {
    check(cudaEventRecord(begin, stream));
    check(cudaGraphLaunch(replay, stream));
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    check(cudaEventElapsedTime(&milliseconds.emplace_back(), begin, end));
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  std::nth_element(milliseconds.begin(), milliseconds.begin() + kReplays / 2, milliseconds.end());
  return 1e-3 * milliseconds[kReplays / 2];
}

#endif

// One line of JSON, at once: what follows may fail.
inline void print(const char* name, double value, const char* unit) {
  std::printf("{\"name\": \"%s\", \"value\": %.9g, \"unit\": \"%s\"}\n", name, value, unit);
  std::fflush(stdout);
}

void measure_block_chain();  // block_chain.cu

}  // namespace lpd::bench
