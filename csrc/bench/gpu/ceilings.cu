// lpd_gpu_ceilings: what a GPU can do at most, in ways that the kernels of a decode depend on, a line of JSON each.
//
// Bytes read per second from memory and from L2; pushes of shared memory between blocks of a cluster; a barrier of the
// cluster; a kernel in a graph that does nothing; a model's blocks one after the other.
#include <cstdlib>
#include <stdexcept>

#include "common/ptx.cuh"
#include "recorded_launches.h"

namespace lpd::bench {
namespace {

constexpr int kThreads = 256;
constexpr int kCluster = 8;

// Reads `rounds` times as many words as there are, each block another part in each round: L1 holds none of it.
__global__ void read_kernel(const uint4* from, int64_t words_of_block, int rounds, uint32_t* sink) {
  ptx::follow_launch_before();
  uint32_t found = 0;
  for (int round = 0; round < rounds; ++round) {
    const int64_t part = (int64_t{blockIdx.x} + int64_t{round} * 17) % int64_t{gridDim.x};
    const uint4* const words = from + part * words_of_block;
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < words_of_block; i += kThreads) {
      const uint4 word = load_vector<uint4>(words + i);
      found ^= word.x ^ word.y ^ word.z ^ word.w;
    }
  }
  if (found == 1) *sink = found;  // which it never is
}

// Blocks of a cluster, in pairs, push `per_thread` times 16 bytes of each of `pushing` threads to each other, and wait
// for what comes, in turn at two mbarriers.
__global__ void push_kernel(int rounds, int pushing, int per_thread, float* sink) {
  SMEM_DYN(shared);
  SMEM_ARRAY(uint64_t, barriers, 2);
  ptx::follow_launch_before();
  if (ptx::has_clusters()) {
    float4* const received = reinterpret_cast<float4*>(shared);
    const auto thread = static_cast<int>(threadIdx.x);
    if (thread == 0) {
      ptx::mbarrier_init(barriers, 1);
      ptx::mbarrier_init(barriers + 1, 1);
      ptx::fence_mbarrier_init();
    }
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
    const unsigned other = (blockIdx.x % kCluster) ^ 1u;
    for (int round = 0; round < rounds; ++round) {
      uint64_t* const barrier = barriers + round % 2;
      if (thread == 0) ptx::mbarrier_arrive(barrier, static_cast<unsigned>(16 * pushing * per_thread));
      if (thread < pushing) {
        for (int i = 0; i < per_thread; ++i) {
          const int at = (round % 2 * per_thread + i) * pushing + thread;
          ptx::store_in_block_of_cluster(received + at, other, float4{1.0f, 2.0f, 3.0f, 4.0f}, barrier);
        }
      }
      ptx::mbarrier_wait(barrier, static_cast<unsigned>(round / 2 % 2));
      __syncthreads();  // before the round after next arrives at the same mbarrier
    }
    if (thread < pushing) {
      const float4 last = load_vector<float4>(received + ((rounds - 1) % 2 * per_thread) * pushing + thread);
      if (last.x + last.y + last.z + last.w == 10.0f) sink[blockIdx.x] = 1.0f;
    }
  }
}

__global__ void barrier_kernel(int rounds) {
  ptx::follow_launch_before();
  if (ptx::has_clusters()) {
    for (int round = 0; round < rounds; ++round) ptx::cluster_sync();
  }
}

__global__ void empty_kernel() { ptx::follow_launch_before(); }

void read_from(const char* name, int64_t bytes, int rounds) {
  const auto blocks = static_cast<unsigned>(kEmulated ? 4 : 8 * multiprocessor_count());
  const int64_t words_of_block = bytes / 16 / blocks;
  DeviceArray<uint4> words(words_of_block * blocks);
  DeviceArray<uint32_t> sink(1);
  const double seconds = seconds_of([&](void* stream) {
    launch("read", read_kernel, dim3(blocks), dim3(kThreads), 0, stream, words.data(), words_of_block, rounds,
           sink.data());
  });
  print(name, 1e-9 * 16.0 * static_cast<double>(words_of_block) * blocks * rounds / seconds, "GB/s");
}

// Seconds of a round, in all clusters that run at once.
double seconds_of_push(int rounds, int pushing, int per_thread) {
  const int blocks = kEmulated ? kCluster : multiprocessor_count() / kCluster * kCluster;
  DeviceArray<float> sink(blocks);
  const size_t bytes = size_t{2} * 16 * static_cast<size_t>(pushing * per_thread);
  const double seconds = seconds_of([&](void* stream) {
    launch("push", push_kernel, Grid(dim3(static_cast<unsigned>(blocks)), dim3(kCluster)), dim3(kThreads), bytes,
           stream, rounds, pushing, per_thread, sink.data());
  });
  for (const float came : sink.read()) {
    if (came != 1.0f) throw std::runtime_error("push: not all has come");
  }
  return seconds / rounds;
}

double seconds_of_barrier(int rounds) {
  const auto blocks = static_cast<unsigned>(kEmulated ? kCluster : multiprocessor_count() / kCluster * kCluster);
  return seconds_of([&](void* stream) {
           launch("barrier", barrier_kernel, Grid(dim3(blocks), dim3(kCluster)), dim3(kThreads), 0, stream, rounds);
         }) /
         rounds;
}

double seconds_of_empty(int count, Overlap overlap) {
  const auto all = [&](void* stream) {
    for (int i = 0; i < count; ++i) launch("empty", empty_kernel, dim3(1), dim3(32), 0, stream);
  };
  return seconds_of(all, overlap) / count;
}

void measure_memory_and_launches() {
  constexpr int kRounds = kEmulated ? 4 : 1000;
  read_from("read from memory", kEmulated ? 1 << 16 : int64_t{4} << 30, 1);
  read_from("read from L2", kEmulated ? 1 << 16 : int64_t{16} << 20, kEmulated ? 2 : 50);
  print("empty kernel in a graph", 1e6 * seconds_of_empty(kRounds, Overlap::kAllowed), "us");
  print("empty kernel in a graph, made to wait", 1e6 * seconds_of_empty(kRounds, Overlap::kForbidden), "us");
}

void measure_clusters() {
  constexpr int kRounds = kEmulated ? 4 : 1000;
  print("push of 16 bytes in a cluster, there and seen", 1e9 * seconds_of_push(kRounds, 1, 1), "ns");
  constexpr int kPerThread = 4;
  print("push of 16 KB, per block", 1e-9 * 16 * kThreads * kPerThread / seconds_of_push(kRounds, kThreads, kPerThread),
        "GB/s");
  print("barrier of a cluster of 8", 1e9 * seconds_of_barrier(kRounds), "ns");
}

}  // namespace
}  // namespace lpd::bench

// The emulated one takes the compute capability that is to be emulated, such as 80; 90 without it.
int main([[maybe_unused]] int argc, [[maybe_unused]] char** argv) {
#ifdef LPD_CUDA_EMULATED
  lpd::emulator::settings().compute_capability = argc > 1 ? std::atoi(argv[1]) : 90;
  lpd::emulator::settings().multiprocessors = 132;
  lpd::emulator::settings().launches_follow = true;
#else
  int devices = 0;
  lpd::bench::check(cudaGetDeviceCount(&devices));
#endif
  try {
    lpd::bench::measure_memory_and_launches();
    if (lpd::can_form_clusters(lpd::bench::push_kernel)) {  // as our products do, of which the blocks are made
      lpd::bench::measure_clusters();
      lpd::bench::measure_block_chain();
    }
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "lpd_gpu_ceilings: %s\n", error.what());
    return 1;
  }
  return 0;
}
