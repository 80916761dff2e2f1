// The runtime: clusters of blocks (mostly of one) one after the other, the threads of a cluster as fibers that run
// until they must wait.
//
// It is never instrumented by TSan: what it keeps about threads is no memory of the kernel. TSan learns the order of
// the kernel's accesses from release() and acquire() alone, and those stand only where CUDA promises an order: at
// __syncthreads, __syncwarp and barriers of a cluster, and from atomics between fences.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator_counters.h"
#include "emulator_state.h"
#include "fiber.h"
#include "ready_set.h"
#include "shared_memory.h"

namespace lpd::emulator {
namespace {

#ifdef LPD_EMULATOR_ASAN
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

std::mutex one_grid;  // at a time
Settings current_settings;

std::vector<Fiber> fibers;  // [kFiberSets, kMaxThreads]
ReadySet ready;
SharedMemory shared;
Fiber host;
char* stacks = nullptr;
constexpr size_t kStackPitch = kPage + kStackBytes;  // an inaccessible page below each

[[noreturn]] void leave_grid() {
  if (!self) throw std::runtime_error(grid.failure);
  Fiber& from = *self->fiber;
  self = nullptr;
  release(&grid.exit_token);
  switch_fiber(from, host, /*for_ever=*/true);
  __builtin_unreachable();
}

[[noreturn]] void report_deadlock() {
  const Thread* waiting = threads.data();
  while (waiting->state == State::kExited) ++waiting;
  const uint3 b = waiting->block->index;
  fail("deadlock: no thread can run; thread %u of block (%u, %u, %u) waits %s", in_block(*waiting), b.x, b.y, b.z,
       whereabouts(*waiting).text);
}

void thread_main() {
  entered_fiber();
  acquire(&grid.start_token);
  grid.body(grid.call);
  Thread& thread = *self;
  Block& block = *thread.block;
  if (thread.first_copy != thread.last_copy) {
    fail("exits with %u cp.async in flight", static_cast<unsigned>(thread.last_copy - thread.first_copy));
  }
  if (grid.early && !thread.waited_for_launch) fail("exits without having waited for the launch before");
  if (cluster.arrived > 0 || thread.arrivals != thread.waits) {
    fail("divergent cluster barrier: exits before it is passed; %u of %u threads have arrived", cluster.arrived,
         cluster.threads);
  }
  if (block.lent_until > cluster.barriers) {
    fail("exits while another block may access its shared memory: no cluster barrier came after that");
  }
  thread.state = State::kExited;
  ready.erase(thread.linear);
  --cluster.alive;
  if (--block.alive == 0) {
    check_mbarriers_at_exit(block);
    shared.end_block(block.rank);
  }
  warps[thread.warp].exited |= 1u << thread.lane;
  release(&grid.exit_token);
  release_barrier_if_all_arrived(block);
  run_next();
  __builtin_unreachable();
}

void allocate_threads() {
  threads.resize(kMaxThreads);
  fibers.resize(kFiberSets * kMaxThreads);
  stacks = map_pages(fibers.size() * kStackPitch);
  for (size_t i = 0; i < fibers.size(); ++i) {
    forbid_page(stacks + i * kStackPitch);
    fibers[i].stack = stacks + i * kStackPitch + kPage;
    fibers[i].stack_bytes = kStackBytes;
  }
}

void start_threads() {
  if (threads.empty()) allocate_threads();
  const dim3 size = grid.block_size;
  for (unsigned linear = 0; linear < cluster.threads; ++linear) {
    Thread& thread = threads[linear];
    thread.block = &blocks[linear / cluster.block_threads];
    thread.linear = linear;
    const unsigned i = in_block(thread);
    thread.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    thread.lane = i % 32;
    thread.warp = thread.block->rank * warps_per_block() + i / 32;
    thread.first_copy = thread.last_copy = thread.groups = 0;
    thread.arrivals = thread.waits = 0;
    thread.waited_for_launch = false;
    thread.fiber = &fibers[grid.clusters_run % kFiberSets * kMaxThreads + linear];
    start_fiber(*thread.fiber, thread_main, linear);
    make_ready(thread);
    if (thread.lane == 0) {
      warps[thread.warp] = {};
      warps[thread.warp].first = linear;
      warps[thread.warp].lanes = std::min(32u, cluster.block_threads - i);
    }
  }
}

// Blocks of a cluster are its neighbours in x first, then in y, then in z.
void start_blocks(uint64_t index) {
  const dim3 size = grid.cluster_size;
  const uint64_t x = grid.size.x / size.x, y = grid.size.y / size.y;  // clusters of the grid
  const uint3 first{static_cast<unsigned>(index % x) * size.x, static_cast<unsigned>(index / x % y) * size.y,
                    static_cast<unsigned>(index / x / y) * size.z};
  for (unsigned rank = 0; rank < cluster.blocks; ++rank) {
    Block& block = blocks[rank];
    block = {};
    block.index = {first.x + rank % size.x, first.y + rank / size.x % size.y, first.z + rank / size.x / size.y};
    block.rank = rank;
    block.first_thread = rank * cluster.block_threads;
    block.alive = cluster.block_threads;
  }
}

void run_cluster(uint64_t index, size_t dynamic_bytes) {
  cluster = {};
  cluster.blocks = grid.cluster_size.x * grid.cluster_size.y * grid.cluster_size.z;
  cluster.block_threads = grid.block_size.x * grid.block_size.y * grid.block_size.z;
  cluster.threads = cluster.alive = cluster.blocks * cluster.block_threads;
  cluster.tokens = std::make_unique<Tokens>();
  forget_mbarriers();
  cluster.random.seed(static_cast<unsigned>(current_settings.seed * 7919 + index));
  start_blocks(index);
  shared.start_cluster(cluster.blocks, dynamic_bytes);
  ready.clear();
  start_threads();
  release(&grid.start_token);
  run_next();  // comes back when all threads have exited, or one has failed
  for (unsigned i = 0; i < cluster.threads; ++i) {
    if (threads[i].state != State::kExited) abandon_fiber(*threads[i].fiber, host);
  }
  ++grid.clusters_run;
  for (unsigned rank = 0; rank < cluster.blocks; ++rank) converge_warps_of(blocks[rank]);
}

// In the form of cuda_launch.cu.
void check_launch(size_t shared_bytes) {
  const auto refuse = [&](const std::string& reason) {
    throw std::runtime_error(std::string(grid.name) + ": " + reason);
  };
  const dim3 g = grid.size, b = grid.block_size, c = grid.cluster_size;
  const bool valid = g.x > 0 && g.y > 0 && g.z > 0 && g.x <= 0x7fffffffu && g.y <= 65535 && g.z <= 65535 && b.x > 0 &&
                     b.y > 0 && b.z > 0 && b.x <= 1024 && b.y <= 1024 && b.z <= 64 && uint64_t{b.x} * b.y * b.z <= 1024;
  if (!valid) refuse("invalid configuration argument");
  const uint64_t blocks_of_cluster = uint64_t{c.x} * c.y * c.z;
  const bool clusters_are_valid = blocks_of_cluster > 0 && blocks_of_cluster <= kMaxClusterBlocks && g.x % c.x == 0 &&
                                  g.y % c.y == 0 && g.z % c.z == 0;
  if (!clusters_are_valid) refuse("invalid cluster size");
  if (blocks_of_cluster > 1 && !device_has_clusters()) {
    refuse("clusters of blocks need compute capability 9.0");
  }
  if (blocks_of_cluster * b.x * b.y * b.z > kMaxThreads) refuse("a cluster has too many threads for the emulator");
  if (shared_bytes > current_settings.shared_limit) {
    refuse("it needs " + std::to_string(shared_bytes) + " bytes of shared memory per block, this GPU offers " +
           std::to_string(current_settings.shared_limit));
  }
}

}  // namespace

void run_next() {
  if (ready.empty() && cluster.alive > 0) report_deadlock();
  Thread* const from = self;
  Thread* to = nullptr;
  if (cluster.alive > 0) {
    switch (grid.order) {
      case Order::kAscending: to = &threads[ready.upwards(0)]; break;
      case Order::kDescending: to = &threads[ready.downwards(cluster.threads - 1)]; break;
      case Order::kRandom: to = &threads[ready.upwards(static_cast<unsigned>(cluster.random() >> 8) % cluster.threads)];
    }
  }
  if (to == from) return;
  self = to;
  switch_fiber(from ? *from->fiber : host, to ? *to->fiber : host, from && from->state == State::kExited);
}

void make_ready(Thread& thread) {
  thread.state = State::kReady;
  ready.insert(thread.linear);
}

void make_wait(Thread& thread, State state, Place place) {
  thread.state = state;
  thread.place = place;
  ready.erase(thread.linear);
}

void maybe_yield() {
  if (grid.order == Order::kRandom) run_next();
}

Settings& settings() { return current_settings; }
uint3 thread_index() { return self->index; }
uint3 block_index() { return self->block->index; }
dim3 block_size() { return grid.block_size; }
dim3 grid_size() { return grid.size; }
bool device_has_clusters() { return current_settings.compute_capability >= 90; }
unsigned lane() { return self->lane; }
unsigned warp() { return self->warp; }
void* dynamic_shared() { return shared.dynamic(self->block->rank); }
bool is_shared(const void* address) { return shared.block_of(address) >= 0; }
bool is_own_shared(const void* address) {
  return self && shared.block_of(address) == static_cast<int>(self->block->rank);
}
bool is_peer_shared(const void* address) { return self && is_shared(address) && !is_own_shared(address); }

bool is_private(const void* address) {
  return (address >= stacks && address < stacks + fibers.size() * kStackPitch) ||
         (address >= host.stack && address < host.stack + host.stack_bytes);
}

void fail(const char* format, ...) {
  char what[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof(what), format, arguments);
  va_end(arguments);
  if (!self) {
    std::snprintf(grid.failure, sizeof(grid.failure), "CUDA emulator: %s", what);
  } else {
    const uint3 b = self->block->index, t = self->index;
    std::snprintf(grid.failure, sizeof(grid.failure), "CUDA emulator: %s, block (%u, %u, %u), thread (%u, %u, %u): %s",
                  grid.name, b.x, b.y, b.z, t.x, t.y, t.z, what);
  }
  leave_grid();
}

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  char* const memory = shared.declared(self->block->rank, key, bytes, alignment);
  if (shared.bytes() > current_settings.shared_limit) {
    std::snprintf(grid.failure, sizeof(grid.failure),
                  "%s: it needs %zu bytes of shared memory per block, this GPU offers %zu", grid.name, shared.bytes(),
                  current_settings.shared_limit);
    leave_grid();
  }
  return memory;
}

void* in_block_of_cluster(void* address, unsigned rank) {
  if (!device_has_clusters()) fail("mapa needs compute capability 9.0");
  if (rank >= cluster.blocks) fail("mapa: block %u of a cluster of %u", rank, cluster.blocks);
  if (!is_own_shared(address)) fail("mapa: %p is not in shared memory of the block", address);
  return shared.in_block(address, rank);
}

unsigned shared_rank(const void* address) { return static_cast<unsigned>(shared.block_of(address)); }

Block& check_runs(const void* address, size_t bytes) {
  const unsigned rank = shared_rank(address);
  if (rank >= cluster.blocks || !shared.holds(address, bytes)) {
    fail("access to %zu bytes at %p, outside shared memory of block %u of the cluster", bytes, address, rank);
  }
  Block& owner = blocks[rank];
  if (&owner == self->block) return owner;
  if (self->waits == 0) fail("access to block %u of the cluster, which no cluster barrier has shown to run", rank);
  if (owner.alive == 0) fail("access to shared memory of block %u of the cluster, which has exited", rank);
  return owner;
}

void check_shared_access(const void* address, size_t bytes) {
  if (!is_peer_shared(address)) return;
  Block& owner = check_runs(address, bytes);
  owner.lent_until = std::max(owner.lent_until, self->arrivals + 1);
}

void push_copy(void* to, const void* from) {
  Thread& thread = *self;
  if (thread.last_copy - thread.first_copy == Thread::kMaxCopies) {
    fail("more than %u cp.async in flight", Thread::kMaxCopies);
  }
  thread.copies[thread.last_copy++ % Thread::kMaxCopies] = {to, from, thread.groups};
}

void end_copy_group() { ++self->groups; }

bool pop_copy(uint64_t groups_in_flight, Copy* copy) {
  Thread& thread = *self;
  if (thread.first_copy == thread.last_copy) return false;
  const Copy& first = thread.copies[thread.first_copy % Thread::kMaxCopies];
  if (first.group + groups_in_flight >= thread.groups) return false;
  *copy = first;
  ++thread.first_copy;
  return true;
}

void run_grid(const char* name, dim3 grid_size_, dim3 cluster_size, dim3 block_size_, size_t shared_bytes,
              void (*body)(const void*), const void* call) {
  const std::lock_guard<std::mutex> lock(one_grid);
  self = nullptr;
  const bool early = current_settings.launches_follow && device_has_clusters();
  grid = {name, grid_size_, cluster_size, block_size_, early, body, call, current_settings.order, 0, 0, 0, {}};
  check_launch(shared_bytes);
  if (current_settings.launches_follow) begin_launch();
  adopt_thread(host);
  std::vector<uint32_t> order(size_t{grid.size.x / cluster_size.x} * (grid.size.y / cluster_size.y) *
                              (grid.size.z / cluster_size.z));
  std::iota(order.begin(), order.end(), 0u);
  if (grid.order == Order::kDescending) std::reverse(order.begin(), order.end());
  if (grid.order == Order::kRandom) std::shuffle(order.begin(), order.end(), std::mt19937_64(current_settings.seed));

  begin_counted_grid(name, grid.size, grid.cluster_size, grid.block_size);
  for (const uint32_t index : order) {
    run_cluster(index, shared_bytes);
    if (grid.failure[0] != '\0') break;
  }
  acquire(&grid.exit_token);
  end_counted_grid(shared.bytes());
  if (grid.failure[0] != '\0') throw std::runtime_error(grid.failure);
}

}  // namespace lpd::emulator
