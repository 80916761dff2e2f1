// Kernels with one mistake each, and clean ones beside them: what the emulator has to report, and what not.
//
//   planted_mistakes NAME...   runs these kernels in three thread orders each; prints the number of NaNs and the bytes
//                              they wrote, a line per run; exit code 86 if the emulator stopped one, with its report
//   planted_mistakes           lists the names
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

#include "planted_pipeline.h"

namespace lpd {
namespace {

__device__ int thread_of_block() { return static_cast<int>(threadIdx.x); }

__device__ float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// ---- Shared memory and barriers ----
enum class Between { kNothing, kSyncWarp, kSyncThreads };

// Each thread hands its input to its neighbour in the warp.
template <Between kBetween>
__global__ void swap_neighbours_kernel(const float* in, float* out) {
  SMEM_ARRAY(float, values, 64);
  const int i = thread_of_block();
  values[i] = in[i];
  if (kBetween == Between::kSyncWarp) __syncwarp();
  if (kBetween == Between::kSyncThreads) __syncthreads();
  out[i] = values[i ^ 1];
}

// Three rounds through the same buffer.
template <bool kBarrierBeforeReuse>
__global__ void reverse_rounds_kernel(const float* in, float* out) {
  SMEM_ARRAY(float, values, 64);
  const int i = thread_of_block();
  float sum = 0.0f;
  for (int round = 0; round < 3; ++round) {
    values[i] = in[i] + static_cast<float>(round);
    __syncthreads();
    sum += values[63 - i];
    if (kBarrierBeforeReuse) __syncthreads();
  }
  out[i] = sum;
}

template <int kWritten>  // of 64
__global__ void copy_through_shared_kernel(const float* in, float* out) {
  SMEM_ARRAY(float, values, 64);
  const int i = thread_of_block();
  if (i < kWritten) values[i] = in[i];
  __syncthreads();
  out[i] = values[i];
}

template <int kShift>
__global__ void shift_in_shared_kernel(const float* in, float* out) {
  SMEM_ARRAY(float, values, 65);
  const int i = thread_of_block();
  values[i] = in[i];
  if (i == 0) values[64] = 0.0f;
  __syncthreads();
  out[i] = values[i + kShift];
}

template <bool kBarrier>
__global__ void load_matrix_kernel(const float* in, float* out) {
  SMEM_ARRAY(float, rows, 256);  // 64 rows of 16 bytes, 32 for each warp
  const int i = thread_of_block();
  for (int k = 0; k < 4; ++k) rows[64 * k + i] = in[i];
  if (kBarrier) __syncthreads();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, rows + 4 * i);
  out[i] = __uint_as_float(r[0]);
}

// ---- Warps ----
template <bool kAllTakePart>
__global__ void swap_by_shuffle_kernel(const float* in, float* out) {
  const int i = thread_of_block();
  float value = in[i];
  if (kAllTakePart || i % 32 < 16) value = __shfl_xor_sync(kAllLanes, value, 1);
  out[i] = value;
}

template <bool kEarlyReturn>
__global__ void half_a_warp_kernel(const float* in, float* out) {
  const int i = thread_of_block();
  if (kEarlyReturn && i % 32 >= 16) return;
  __syncwarp();
  out[i] = in[i];
}

// ---- Global memory ----
template <bool kAligned>
__global__ void load_vectors_kernel(const float* in, float* out) {
  const int i = thread_of_block() / 2;
  const float4 v = load_vector<float4>(in + (kAligned ? 4 * (i / 4) : i));
  out[thread_of_block()] = v.x;
}

__global__ void cast_to_vectors_kernel(const float* in, float* out) {
  const int i = thread_of_block() / 2;
  out[thread_of_block()] = reinterpret_cast<const float4*>(in + i)->x;
}

enum class Addition { kPlain, kAtomic };

template <Addition kAddition>
__global__ void count_threads_kernel(const float*, float* out) {
  if (kAddition == Addition::kAtomic) {
    atomicAdd(out, 1.0f);
  } else {
    out[0] += 1.0f;
  }
}

template <bool kOwnElement>
__global__ void write_block_index_kernel(const float*, float* out) {
  if (threadIdx.x == 0) out[kOwnElement ? blockIdx.x : 0] = static_cast<float>(blockIdx.x);
}

template <bool kWait>
__global__ void copy_asynchronously_kernel(const float* in, float* out) {
  SMEM_ARRAY(float, values, 64);
  const int i = thread_of_block();
  if (i < 16) ptx::cp_async16(values + 4 * i, in + 4 * i);
  ptx::cp_async_commit();
  if (kWait) ptx::cp_async_wait<0>();
  __syncthreads();
  out[i] = kWait ? values[i] : 0.0f;
}

// Each block leaves a partial sum; the last one to arrive adds them up, by another thread than the one that counts the
// arrivals. out: sum, partial sums, arrivals.
template <bool kFenceBefore, bool kFenceAfter>
__global__ void last_block_sums_kernel(const float* in, float* out) {
  const int i = thread_of_block(), block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  float* const partial_sums = out + 1;
  unsigned* const arrivals = reinterpret_cast<unsigned*>(out + 1 + blocks);
  const float sum = warp_sum(in[i]);
  if (i == 0) partial_sums[block] = sum * static_cast<float>(block + 1);
  if (kFenceBefore) __threadfence();
  __syncthreads();
  const bool is_last = i == 0 && atomicInc(arrivals, gridDim.x - 1) == gridDim.x - 1;
  if (!__syncthreads_or(is_last)) return;
  if (kFenceAfter) __threadfence();
  if (i != 32) return;
  float total = 0.0f;
  for (int b = 0; b < blocks; ++b) total += partial_sums[b];
  out[0] = total;
}

// ---- Clusters of blocks ----
enum class InCluster {
  kClean,
  kReadBeforeStart,
  kReadBeforeBarrier,
  kReadAfterArrival,
  kRelaxedArrival,
  kExitBeforeBarrier,
  kBlockWithoutBarrier,
  kWarpsAtTwoBarriers,
  kArrivalWithoutWait,
  kNoSuchBlock,
  kOutOfBounds,
};

// Each of two blocks reads what the other one has in its shared memory.
template <InCluster kMistake>
__global__ void read_other_block_kernel(const float* in, float* out) {
  SMEM_ARRAY(float, values, 64);
  const int i = thread_of_block(), block = static_cast<int>(blockIdx.x);
  if (kMistake == InCluster::kBlockWithoutBarrier && block == 1) return;
  if (kMistake != InCluster::kReadBeforeStart) {
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  }
  values[i] = in[i] + static_cast<float>(block);
  if (kMistake == InCluster::kWarpsAtTwoBarriers && i < 32) {
    ptx::cluster_sync();
  } else if (kMistake == InCluster::kReadBeforeBarrier) {
    __syncthreads();
  } else if (kMistake == InCluster::kReadAfterArrival) {
    ptx::cluster_arrive();
  } else if (kMistake == InCluster::kRelaxedArrival) {
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  } else if (kMistake != InCluster::kReadBeforeStart) {
    ptx::cluster_sync();
  }
  const unsigned other = static_cast<unsigned>(kMistake == InCluster::kNoSuchBlock ? block + 1 : 1 - block);
  const float* const theirs = ptx::in_block_of_cluster(values, other);
  if (i < 32) {
    out[32 * block + i] = load_vector<float2>(theirs + 2 * i + (kMistake == InCluster::kOutOfBounds ? 2 : 0)).y;
  }
  if (kMistake == InCluster::kReadAfterArrival) ptx::cluster_wait();
  if (kMistake == InCluster::kArrivalWithoutWait) ptx::cluster_arrive();
  if (kMistake != InCluster::kExitBeforeBarrier && kMistake != InCluster::kArrivalWithoutWait) ptx::cluster_sync();
}

// Each of two blocks writes to the other one.
template <bool kBarrier>
__global__ void write_other_block_kernel(const float* in, float* out) {
  SMEM_DYN(bytes);
  float* const values = reinterpret_cast<float*>(bytes);
  const int i = thread_of_block(), block = static_cast<int>(blockIdx.x);
  ptx::cluster_sync();
  if (i < 32) {
    store_vector(ptx::in_block_of_cluster(values, static_cast<unsigned>(1 - block)) + 2 * i, float2{in[i], in[i + 32]});
  }
  if (kBarrier) ptx::cluster_sync();
  if (i < 32) out[32 * block + i] = values[i];
  if (!kBarrier) ptx::cluster_sync();
}

// Each of two blocks stores to the other one, which waits for the bytes; two phases of one barrier.
enum class Push {
  kClean,
  kBeforeStart,
  kNoWait,
  kTooManyBytes,
  kTooFewBytes,
  kNoInit,
  kNoFence,
  kSameTargetAtOnce,
  kMisaligned,
  kNoBarrierBetweenRounds,
};

template <Push kMistake>
__global__ void push_to_other_block_kernel(const float* in, float* out) {
  SMEM_ARRAY(float4, values, 33);
  SMEM_ARRAY(uint64_t, barrier, 1);
  const int i = thread_of_block(), block = static_cast<int>(blockIdx.x);
  const unsigned other = static_cast<unsigned>(1 - block);
  constexpr unsigned kBytes = kMistake == Push::kTooManyBytes ? 272 : kMistake == Push::kTooFewBytes ? 240 : 256;
  if (i == 0 && kMistake != Push::kNoInit) {
    ptx::mbarrier_init(barrier, 1);
    if (kMistake != Push::kNoFence) ptx::fence_mbarrier_init();
  }
  if (kMistake != Push::kBeforeStart) {
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  }
  float sum = 0.0f;
  for (unsigned round = 0; round < 2; ++round) {
    if (i == 0 && kMistake != Push::kNoInit) ptx::mbarrier_arrive(barrier, kBytes);
    // The buffer of a round is the other half of that before it, so nobody stores over what is still read.
    float4* const to = values + (kMistake == Push::kSameTargetAtOnce ? i % 15 : i % 16 + 16 * static_cast<int>(round));
    const float x = in[i] + static_cast<float>(round);
    if (i < 16) {
      float4* const target = kMistake == Push::kMisaligned ? reinterpret_cast<float4*>(&to->y) : to;
      ptx::store_in_block_of_cluster(target, other, float4{x, x + 1.0f, x + 2.0f, x + 3.0f}, barrier);
    }
    if (kMistake != Push::kNoWait && kMistake != Push::kNoInit) ptx::mbarrier_wait(barrier, round);
    if (i < 32) sum += values[i % 16 + 16 * static_cast<int>(round)].w;
    // A thread that is two phases late cannot tell the one it waits for from the next.
    if (kMistake != Push::kNoBarrierBetweenRounds) __syncthreads();
  }
  if (i < 32) out[32 * block + i] = sum;
}

// ---- Launches that begin before the one before has ended ----
enum class Early { kClean, kReadsTooEarly, kCopiesTooEarly, kWritesTooEarly, kLeavesTooEarly, kNoWait, kLetsNextBegin };

__global__ void write_before_kernel(const float* in, float* middle) {
  const int i = thread_of_block();
  ptx::follow_launch_before();
  if (i < 16) store_vector(middle + 4 * i, load_vector<float4>(in + 4 * i));
}

// Adds what the launch before wrote to what has been there for longer.
template <Early kMistake>
__global__ void begin_early_kernel(const float* in, const float* middle, float* out) {
  SMEM_ARRAY(float4, values, 16);
  const int i = thread_of_block(), at = 4 * (i % 16);
  const float4 old = load_vector<float4>((kMistake == Early::kReadsTooEarly ? middle : in) + at);
  if (kMistake == Early::kLeavesTooEarly && i == 63) return;
  if (kMistake == Early::kWritesTooEarly) store_vector(out + at, old);
  if (kMistake == Early::kCopiesTooEarly && i < 16) ptx::cp_async16(values + i, middle + at);
  if (kMistake == Early::kLetsNextBegin) ptx::let_launch_after_begin();
  if (kMistake != Early::kNoWait) ptx::wait_for_launch_before();
  if (kMistake != Early::kNoWait) ptx::let_launch_after_begin();
  if (kMistake != Early::kCopiesTooEarly && i < 16) ptx::cp_async16(values + i, middle + at);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  if (i < 16) store_vector(out + at, float4{old.x + values[i].x, old.y, old.z, old.w + values[i].w});
}

// ---- Running them ----
using Kernel = void (*)(const float*, float*);

// Memory of exactly this size, so that ASan sees its ends.
template <class T>
struct Array {
  explicit Array(size_t count) : bytes(count * sizeof(T)), data(static_cast<T*>(std::malloc(bytes))) {}
  ~Array() { std::free(data); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  const size_t bytes;
  T* const data;
};

// NaNs, and everything, in hexadecimal: what may not depend on the order of threads.
void print_output(const Array<float>& out) {
  int nans = 0;
  for (size_t i = 0; i < out.bytes / sizeof(float); ++i) nans += std::isnan(out.data[i]);
  std::printf("%d ", nans);
  for (size_t i = 0; i < out.bytes; ++i) std::printf("%02x", reinterpret_cast<const unsigned char*>(out.data)[i]);
  std::printf("\n");
}

void run(const char* name, Kernel kernel, Grid grid, size_t shared_bytes) {
  Array<float> in(64), out(64);
  for (int i = 0; i < 64; ++i) in.data[i] = static_cast<float>(i % 7);
  std::memset(out.data, 0, out.bytes);
  launch(name, kernel, grid, dim3(64), shared_bytes, nullptr, in.data, out.data);
  print_output(out);
}

template <Mistake kMistake>
void run_product(const char* name) {
  constexpr int kRows = 40, kDepth = 64;
  Array<BFloat16> a(kRows * kDepth), b(kDepth * 16);
  Array<float> out(kRows * 16);
  for (int i = 0; i < kRows * kDepth; ++i) a.data[i] = from_float<BFloat16>(static_cast<float>(i * i % 11 - 5));
  for (int i = 0; i < kDepth * 16; ++i) b.data[i] = from_float<BFloat16>(static_cast<float>(i * i % 13 - 6));
  std::memset(out.data, 0xff, out.bytes);
  const size_t shared_bytes = 2 * (32 + 16) * 16 * sizeof(BFloat16);
  launch(name, product_kernel<kMistake>, dim3(2), dim3(64), shared_bytes, nullptr, a.data, b.data, out.data, kRows,
         kDepth);
  print_output(out);
}

using Run = std::function<void(const char* name)>;

Run of(Kernel kernel, unsigned blocks = 1, size_t shared_bytes = 0) {
  return [=](const char* name) { run(name, kernel, dim3(blocks), shared_bytes); };
}

Run in_cluster(Kernel kernel, unsigned blocks = 2, unsigned cluster = 2, int compute_capability = 90) {
  return [=](const char* name) {
    emulator::settings().compute_capability = compute_capability;
    run(name, kernel, Grid(dim3(blocks), dim3(cluster)), 256);
  };
}

template <Early kMistake>
void run_early(const char* name) {
  emulator::settings().launches_follow = true;
  emulator::settings().compute_capability = 90;
  Array<float> in(64), middle(64), out(64);
  for (int i = 0; i < 64; ++i) in.data[i] = static_cast<float>(i % 7);
  std::memset(out.data, 0, out.bytes);
  try {
    launch("write_before", write_before_kernel, dim3(1), dim3(64), 0, nullptr, in.data, middle.data);
    launch(name, begin_early_kernel<kMistake>, dim3(1), dim3(64), 0, nullptr, in.data, middle.data, out.data);
  } catch (...) {
    emulator::settings().launches_follow = false;
    throw;
  }
  emulator::settings().launches_follow = false;
  print_output(out);
}

const std::map<std::string, Run> kKernels = {
    {"clean_syncwarp", of(swap_neighbours_kernel<Between::kSyncWarp>)},
    {"clean_syncthreads", of(swap_neighbours_kernel<Between::kSyncThreads>)},
    {"missing_syncwarp", of(swap_neighbours_kernel<Between::kNothing>)},
    {"clean_buffer_reuse", of(reverse_rounds_kernel<true>)},
    {"missing_barrier_before_reuse", of(reverse_rounds_kernel<false>)},
    {"clean_shared_copy", of(copy_through_shared_kernel<64>)},
    {"uninitialised_shared", of(copy_through_shared_kernel<16>)},
    {"clean_static_shared", of(shift_in_shared_kernel<1>)},
    {"static_shared_out_of_bounds", of(shift_in_shared_kernel<2>)},
    {"clean_ldmatrix", of(load_matrix_kernel<true>)},
    {"ldmatrix_before_barrier", of(load_matrix_kernel<false>)},
    {"clean_shuffle", of(swap_by_shuffle_kernel<true>)},
    {"divergent_shuffle", of(swap_by_shuffle_kernel<false>)},
    {"clean_whole_warp", of(half_a_warp_kernel<false>)},
    {"return_before_syncwarp", of(half_a_warp_kernel<true>)},
    {"clean_vectors", of(load_vectors_kernel<true>)},
    {"misaligned_vector", of(load_vectors_kernel<false>)},
    {"misaligned_cast", of(cast_to_vectors_kernel)},
    {"clean_atomic", of(count_threads_kernel<Addition::kAtomic>, 3)},
    {"plain_addition", of(count_threads_kernel<Addition::kPlain>)},
    {"clean_blocks", of(write_block_index_kernel<true>, 4)},
    {"race_between_blocks", of(write_block_index_kernel<false>, 4)},
    {"clean_copy", of(copy_asynchronously_kernel<true>)},
    {"copy_in_flight_at_exit", of(copy_asynchronously_kernel<false>)},
    {"clean_last_block", of(last_block_sums_kernel<true, true>, 4)},
    {"no_fence_before_counter", of(last_block_sums_kernel<false, true>, 4)},
    {"no_fence_after_counter", of(last_block_sums_kernel<true, false>, 4)},
    {"clean_cluster", in_cluster(read_other_block_kernel<InCluster::kClean>)},
    {"peer_read_before_start", in_cluster(read_other_block_kernel<InCluster::kReadBeforeStart>)},
    {"peer_read_before_barrier", in_cluster(read_other_block_kernel<InCluster::kReadBeforeBarrier>)},
    {"peer_read_after_arrival", in_cluster(read_other_block_kernel<InCluster::kReadAfterArrival>)},
    {"peer_read_after_relaxed_arrival", in_cluster(read_other_block_kernel<InCluster::kRelaxedArrival>)},
    {"exit_while_peer_reads", in_cluster(read_other_block_kernel<InCluster::kExitBeforeBarrier>)},
    {"block_without_cluster_barrier", in_cluster(read_other_block_kernel<InCluster::kBlockWithoutBarrier>)},
    {"warps_at_two_cluster_barriers", in_cluster(read_other_block_kernel<InCluster::kWarpsAtTwoBarriers>)},
    {"arrival_without_wait", in_cluster(read_other_block_kernel<InCluster::kArrivalWithoutWait>)},
    {"no_such_peer", in_cluster(read_other_block_kernel<InCluster::kNoSuchBlock>)},
    {"peer_out_of_bounds", in_cluster(read_other_block_kernel<InCluster::kOutOfBounds>)},
    {"clean_peer_write", in_cluster(write_other_block_kernel<true>)},
    {"peer_write_without_barrier", in_cluster(write_other_block_kernel<false>)},
    {"clean_push", in_cluster(push_to_other_block_kernel<Push::kClean>)},
    {"push_before_peer_runs", in_cluster(push_to_other_block_kernel<Push::kBeforeStart>)},
    {"push_without_wait", in_cluster(push_to_other_block_kernel<Push::kNoWait>)},
    {"push_of_fewer_bytes_than_expected", in_cluster(push_to_other_block_kernel<Push::kTooManyBytes>)},
    {"push_of_more_bytes_than_expected", in_cluster(push_to_other_block_kernel<Push::kTooFewBytes>)},
    {"push_without_barrier", in_cluster(push_to_other_block_kernel<Push::kNoInit>)},
    {"push_to_barrier_not_shown", in_cluster(push_to_other_block_kernel<Push::kNoFence>)},
    {"pushes_to_one_place", in_cluster(push_to_other_block_kernel<Push::kSameTargetAtOnce>)},
    {"push_rounds_without_barrier", in_cluster(push_to_other_block_kernel<Push::kNoBarrierBetweenRounds>)},
    {"misaligned_push", in_cluster(push_to_other_block_kernel<Push::kMisaligned>)},
    {"push_on_an_old_device", in_cluster(push_to_other_block_kernel<Push::kClean>, 1, 1, 89)},
    {"clean_early_launch", run_early<Early::kClean>},
    {"early_launch_reads_too_early", run_early<Early::kReadsTooEarly>},
    {"early_launch_copies_too_early", run_early<Early::kCopiesTooEarly>},
    {"early_launch_writes_too_early", run_early<Early::kWritesTooEarly>},
    {"early_launch_is_left_without_wait", run_early<Early::kLeavesTooEarly>},
    {"early_launch_without_wait", run_early<Early::kNoWait>},
    {"early_launch_lets_next_begin_too_early", run_early<Early::kLetsNextBegin>},
    {"part_of_a_cluster", in_cluster(read_other_block_kernel<InCluster::kClean>, 3)},
    {"cluster_too_large", in_cluster(read_other_block_kernel<InCluster::kClean>, 9, 9)},
    {"cluster_on_an_old_device", in_cluster(read_other_block_kernel<InCluster::kClean>, 2, 2, 89)},
    {"clean_much_shared", of(copy_through_shared_kernel<64>, 1, 227 * 1024 - 256)},
    {"too_much_shared", of(copy_through_shared_kernel<64>, 1, 227 * 1024 - 128)},
    {"too_much_dynamic_shared", of(copy_through_shared_kernel<64>, 1, 300000)},
    {"no_blocks", of(copy_through_shared_kernel<64>, 0)},
    {"clean_product", run_product<Mistake::kNone>},
    {"copies_rows_past_the_end", run_product<Mistake::kCopiesRowsPastTheEnd>},
    {"waits_for_too_few_groups", run_product<Mistake::kWaitsForTooFewGroups>},
    {"no_barrier_after_wait", run_product<Mistake::kNoBarrierAfterWait>},
    {"no_barrier_before_refill", run_product<Mistake::kNoBarrierBeforeRefill>},
    {"barrier_in_one_warp", run_product<Mistake::kBarrierInOneWarp>},
    {"stores_rows_past_the_end", run_product<Mistake::kStoresRowsPastTheEnd>},
    {"writes_past_dynamic_shared", run_product<Mistake::kWritesPastDynamicShared>},
};

}  // namespace
}  // namespace lpd

int main(int argc, char** argv) {
  using lpd::emulator::Order;
  if (argc < 2) {
    for (const auto& [name, run] : lpd::kKernels) std::puts(name.c_str());
    return 0;
  }
  int exit_code = 0;
  for (int i = 1; i < argc; ++i) {
    for (const Order order : {Order::kAscending, Order::kDescending, Order::kRandom}) {
      lpd::emulator::settings().order = order;
      try {
        lpd::kKernels.at(argv[i])(argv[i]);
      } catch (const std::runtime_error& report) {
        std::fprintf(stderr, "%s\n", report.what());
        exit_code = 86;
      }
    }
  }
  return exit_code;
}
