// Shared by the CUDA microbenchmarks: device buffers and timing by events. Google Benchmark reports the time of one
// launch and the least bytes that the operator has to move.
#pragma once

#include <benchmark/benchmark.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "bench_shapes.h"
#include "common/dtype.h"

namespace lpd::bench {

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "lpd_bench_cuda: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Device memory with its initial content.
template <class T>
class DeviceArray {
 public:
  DeviceArray(const std::vector<T>& values) {
    check(cudaMalloc(&data_, values.size() * sizeof(T) + 1));
    check(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

// Normally distributed bf16 values, which begin again after a prime number of them.
inline std::vector<uint16_t> random_bf16(int64_t count) {
  static const std::vector<uint16_t> period = [] {
    std::mt19937 generator(0);
    std::normal_distribution<float> normal;
    std::vector<uint16_t> values(65537);
    for (uint16_t& value : values) value = from_float<BFloat16>(normal(generator)).bits;
    return values;
  }();
  std::vector<uint16_t> values(static_cast<size_t>(count));
  for (size_t i = 0, from = 0; i < values.size(); ++i, from = from + 1 < period.size() ? from + 1 : 0) {
    values[i] = period[from];
  }
  return values;
}

struct Timed {
  int launches = 20;  // per pair of events, whose resolution is about half a microsecond
  double flops = 0;   // of one launch, if they count
};

// Times `launch(stream)`; `bytes` is the least one launch moves. Launches are recorded in a graph, as a decode's are,
// so that the host's pace does not count; their data stays in L2 where it fits, as that of a decode's small batches
// does, unless each launch of the graph takes other data.
template <class Launch>
void measure(benchmark::State& state, const Shape& shape, double bytes, Launch launch, Timed timed = {}) {
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  launch(stream);
  cudaGraph_t graph;
  cudaGraphExec_t launches;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < timed.launches; ++i) launch(stream);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&launches, graph, 0));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  for (auto _ : state) {
    check(cudaEventRecord(begin, stream));
    check(cudaGraphLaunch(launches, stream));
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    state.SetIterationTime(milliseconds * 1e-3 / timed.launches);
  }
  state.SetLabel(shape.name);
  state.counters["bytes/s"] = benchmark::Counter(bytes, benchmark::Counter::kIsIterationInvariantRate);
  if (timed.flops > 0) {
    state.counters["FLOP/s"] = benchmark::Counter(timed.flops, benchmark::Counter::kIsIterationInvariantRate);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(launches);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

// The steps in the middle at B = 1 and 32: range(0) is the shape, range(1) the batch.
inline void all_shapes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"shape", "B"})
      ->ArgsProduct({{2, 4}, {1, 32}})
      ->UseManualTime()
      ->Iterations(100)
      ->Unit(benchmark::kMicrosecond);
}

// For what no step changes.
inline void no_shapes(benchmark::internal::Benchmark* bench) {
  bench->UseManualTime()->Iterations(100)->Unit(benchmark::kMicrosecond);
}

}  // namespace lpd::bench
