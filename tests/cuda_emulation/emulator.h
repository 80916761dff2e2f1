// Runs CUDA kernels on the CPU, one fiber per CUDA thread: what cuda.cuh is where LPD_CUDA_EMULATED is defined. See
// docs/design/emulator.md.
//
// Compile the kernels with
//   -std=c++17 -O2 -x c++ -DLPD_CUDA_EMULATED -ffp-contract=off -Wno-unknown-pragmas -Itests/cuda_emulation
//   -Icsrc/kernels
// and link them with the runtime, compiled alike: emulator.cpp, emulator_counters.cpp, emulator_launches.cpp,
// emulator_mbarrier.cpp,
// emulator_synchronization.cpp, fiber.cpp, warp_operations.cpp; -pthread. Beside that
//   to count traffic    the kernels with -DLPD_EMULATOR_COUNT -fsanitize=thread, which is not given to the linker;
//                       the runtime as before, and with it emulator_hooks.cpp
//   for ASan and UBSan  everything with -DLPD_EMULATOR_ASAN -fsanitize=address,undefined
//   for TSan            the kernels with -fsanitize=thread, linked with it too; the runtime without, but with
//                       -DLPD_EMULATOR_TSAN
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>

#include "emulated_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

#define threadIdx (::lpd::emulator::thread_index())
#define blockIdx (::lpd::emulator::block_index())
#define blockDim (::lpd::emulator::block_size())
#define gridDim (::lpd::emulator::grid_size())
#define warpSize 32

#define SMEM_ARRAY(T, name, count)  \
  static const char name##_key = 0; \
  T(&name)[count] = *static_cast<T(*)[count]>(::lpd::emulator::static_shared(&name##_key, sizeof(T[count]), alignof(T)))
#define SMEM_DYN(name) unsigned char* const name = static_cast<unsigned char*>(::lpd::emulator::dynamic_shared())

namespace lpd::emulator {

// Which thread of those that can run goes on, and the order of blocks; results must not depend on it. In the first two
// orders one warp runs as far ahead of the others as barriers let it.
enum class Order { kAscending, kDescending, kRandom };

struct Settings {
  Order order = Order::kAscending;
  uint64_t seed = 0;  // of kRandom
  int multiprocessors = 108;
  int compute_capability = 80;       // from 90 on blocks form clusters
  size_t shared_limit = 227 * 1024;  // bytes per block, static and dynamic
  bool launches_follow = false;      // one stream, each from 9.0 on early: what it does too early is found out
};

// Settings of all launches that start afterwards.
Settings& settings();

// Of the running CUDA thread and its device. By value: reads through a reference would count as the kernel's memory
// traffic.
uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
bool device_has_clusters();
unsigned lane();
unsigned warp();

// Reports a mistake of the kernel: abandons the grid, and launch() throws std::runtime_error("CUDA emulator: ...").
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Shared memory of the running block, filled with 0xFF when it starts. `key` names one declaration.
void* dynamic_shared();
void* static_shared(const void* key, size_t bytes, size_t alignment);
bool is_shared(const void* address);       // of any block of the cluster
bool is_own_shared(const void* address);   // of the running block
bool is_peer_shared(const void* address);  // of another one of its cluster

// Where another block of the cluster has what lies at `address`, in shared memory, in the running one.
void* in_block_of_cluster(void* address, unsigned rank);

// Every access to what may be another block's shared memory: that block must run, and must go on running until a later
// barrier of the cluster.
void check_shared_access(const void* address, size_t bytes);

// Every access to global memory: a launch that may begin before the one before has ended has to wait for that.
void check_launch_order(const void* address, size_t bytes, bool writes);
void wait_for_launch_before();
void let_launch_after_begin();
void forget_launches();

// On the stack of a CUDA thread, or of the thread that launched: registers, local memory and parameters of a kernel.
bool is_private(const void* address);

// Where a kernel calls an intrinsic: default arguments of type Place name the line of the call.
struct Place {
  const char* file;
  int line;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Something the lanes of a warp do together: the last one to come computes all results at once.
struct WarpOperation {
  const char* name;
  void (*compute)(const void* const in[32], void* const out[32], uint32_t mask);  // null where lanes are not in mask
  bool orders_memory;
  bool needs_full_warp;
};
void rendezvous(const WarpOperation& operation, uint32_t mask, const void* in, void* out, Place place);

// Waits for all threads of the block that have not exited; number of them with a nonzero predicate.
int block_barrier(int predicate, Place place);

// The halves of a barrier of all threads of all blocks of the cluster, of which none may have exited. Each is something
// that a warp does together.
void cluster_arrive(bool orders_memory, Place place);
void cluster_wait(Place place);

// mbarrier of the running block: initialised for so many arrivals, and shown to the cluster; an arrival that says how
// many bytes the phase expects besides; and waiting for the end of the phase of this parity.
void mbarrier_init(void* barrier, unsigned arrivals);
void show_mbarriers();
void mbarrier_arrive(void* barrier, unsigned bytes);
bool mbarrier_passed(void* barrier, unsigned parity);
void mbarrier_wait(void* barrier, unsigned parity, Place place);

// st.async of 16 bytes to a block of the cluster. Between `begin`, which checks it, and `end` the target is spoilt;
// true from `end`: somebody waits for it. Each one that `pop` gives out is written, and then has arrived.
struct ClusterStore {
  void* to;
  uint64_t words[2];
};
void begin_cluster_store(void* to, void* barrier);
bool end_cluster_store(const ClusterStore& store, void* barrier);
bool pop_cluster_store(void* barrier, ClusterStore* store);  // false if there is none
void cluster_store_has_arrived(void* barrier);

// __threadfence, and what an atomic operation at `address` does to the order of other accesses.
void fence();
void atomic_order(const void* address);

// Queue of this thread's cp.async.
struct Copy {
  void* to;
  const void* from;  // null: zeros
  uint64_t group;
};
void push_copy(void* to, const void* from);
void end_copy_group();
bool pop_copy(uint64_t groups_in_flight, Copy* copy);  // false if no more need be done

// Counting of traffic (emulator_counters.h). `site` tells one instruction of a kernel from another.
enum class Access { kRead, kWrite, kAtomic, kCopyRead, kCopyWrite, kMatrixRead, kPeerRead, kPeerWrite, kPrefetch };
void count_access(const void* site, const void* address, size_t bytes, Access access);

void run_grid(const char* name, dim3 grid, dim3 cluster, dim3 block, size_t shared_bytes, void (*body)(const void*),
              const void* call);

}  // namespace lpd::emulator

// Accesses that are counted as one, by name, where every plain access of a kernel is counted by the compiler's help.
#ifdef LPD_EMULATOR_COUNT
#define LPD_EMULATED_ACCESS __attribute__((noinline, no_sanitize("thread"), unused)) static
#define LPD_COUNT_ACCESS(address, bytes, access) \
  ::lpd::emulator::count_access(__builtin_return_address(0), address, bytes, ::lpd::emulator::Access::access)
#else
#define LPD_EMULATED_ACCESS inline
#define LPD_COUNT_ACCESS(address, bytes, access) static_cast<void>(0)
#endif

namespace lpd {

template <class Vector>
LPD_EMULATED_ACCESS Vector load_vector(const void* from) {
  static_assert(sizeof(Vector) == 8 || sizeof(Vector) == 16, "4 bytes and less need no wrapper");
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Vector) != 0) {
    emulator::fail("misaligned read of %zu bytes at %p", sizeof(Vector), from);
  }
  emulator::check_shared_access(from, sizeof(Vector));
  emulator::check_launch_order(from, sizeof(Vector), false);
  LPD_COUNT_ACCESS(from, sizeof(Vector), kRead);
  return *static_cast<const Vector*>(from);
}

template <class Vector>
LPD_EMULATED_ACCESS void store_vector(void* to, Vector value) {
  static_assert(sizeof(Vector) == 8 || sizeof(Vector) == 16, "4 bytes and less need no wrapper");
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Vector) != 0) {
    emulator::fail("misaligned write of %zu bytes at %p", sizeof(Vector), to);
  }
  emulator::check_shared_access(to, sizeof(Vector));
  emulator::check_launch_order(to, sizeof(Vector), true);
  LPD_COUNT_ACCESS(to, sizeof(Vector), kWrite);
  *static_cast<Vector*>(to) = value;
}

struct Grid {
  dim3 blocks, cluster;
  Grid(dim3 blocks_, dim3 cluster_ = dim3(1)) : blocks(blocks_), cluster(cluster_) {}
};

// Runs the grid to its end before it returns.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, dim3 block, size_t shared_bytes,
            void* /*stream*/, Arguments... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  const Call call{kernel, std::tuple<Parameters...>(arguments...)};
  const auto body = [](const void* call_of_launch) {
    const Call& c = *static_cast<const Call*>(call_of_launch);
    std::apply(c.kernel, c.parameters);
  };
  emulator::run_grid(name, grid.blocks, grid.cluster, block, shared_bytes, body, &call);
}

inline int multiprocessor_count() { return emulator::settings().multiprocessors; }
inline size_t shared_memory_limit() { return emulator::settings().shared_limit; }

template <class... Parameters>
bool can_form_clusters(void (*)(Parameters...)) {
  return emulator::device_has_clusters();
}

}  // namespace lpd

#include "emulated_intrinsics.h"
