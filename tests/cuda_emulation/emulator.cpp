// The runtime: clusters of blocks (mostly of one) one after the other, the threads of a cluster as fibers that run
// until they must wait.
//
// It is never instrumented by TSan: what it keeps about threads is no memory of the kernel. TSan learns the order of
// the kernel's accesses from release() and acquire() alone, and those stand only where CUDA promises an order: at
// __syncthreads, __syncwarp and barriers of a cluster, and from atomics between fences.
#include "emulator.h"

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator_counters.h"
#include "fiber.h"
#include "ready_set.h"
#include "shared_memory.h"

#ifdef LPD_EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace lpd::emulator {
namespace {

#ifdef LPD_EMULATOR_ASAN
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

#ifdef LPD_EMULATOR_TSAN
// To TSan, what a fiber did in an earlier cluster precedes what it does now. Making new fibers takes long; with three
// sets in turn a cluster is unordered with the two that ran before it.
constexpr unsigned kFiberSets = 3;
void release(const void* token) { __tsan_release(const_cast<void*>(token)); }
void acquire(const void* token) { __tsan_acquire(const_cast<void*>(token)); }
#else
constexpr unsigned kFiberSets = 1;
void release(const void*) {}
void acquire(const void*) {}
#endif

enum class State { kReady, kInWarpOperation, kAtBarrier, kAtClusterBarrier, kExited };

struct Block {
  uint3 index;
  unsigned rank;          // in the cluster
  unsigned first_thread;  // of the cluster's
  unsigned alive, at_barrier;
  int predicates;
  unsigned barriers;    // passed so far
  unsigned arrived;     // threads, at the cluster's barrier under way
  Place arrived_from;   // the first of them
  unsigned lent_until;  // how many of the cluster's barriers have to be passed before it may exit
  bool fenced;          // was there a __threadfence?
  uint64_t atomics;     // addresses of atomics, by bucket
};

struct Thread {
  uint3 index;
  Block* block;
  unsigned linear, warp;  // in the cluster
  unsigned lane;
  State state;
  Fiber* fiber;
  Place place;  // of what it waits in

  const WarpOperation* operation;
  uint32_t mask;
  const void* in;
  void* out;

  int barrier_result;
  unsigned arrivals, waits;  // halves of the cluster's barriers that it has come to

  // Ring of copies in flight. Fixed storage, as is all of this: one fiber must not free what another allocated.
  static constexpr unsigned kMaxCopies = 512;
  std::array<Copy, kMaxCopies> copies;
  uint64_t first_copy, last_copy, groups;
};

struct Warp {
  unsigned first, lanes;  // threads of the cluster, all of one block
  uint32_t waiting, exited;
  std::array<unsigned, 32> meetings;  // passed so far, by the lowest lane of each
};

constexpr unsigned kMaxWarps =
    kMaxThreads / 32 + kMaxClusterBlocks;  // of a cluster; the last one of a block may be small

// Addresses by which TSan knows barriers and warp meetings: of a cluster only, or it would take clusters for ordered.
// Two in turn, because with one a thread that ran ahead to the next meeting would pass its later history to those still
// waking up from this one.
struct Tokens {
  std::array<char, 2> cluster;
  std::array<std::array<char, 2>, kMaxClusterBlocks> barrier;
  std::array<std::array<std::array<char, 2>, 32>, kMaxWarps> warp;  // by the lowest lane that meets
};

// One grid runs at a time (the mutex), so there is one of everything.
std::mutex one_grid;
Settings current_settings;

struct Grid {
  const char* name;
  dim3 size, cluster_size, block_size;
  void (*body)(const void*);
  const void* call;
  Order order;
  char start_token, exit_token;  // for TSan: what the host does precedes a block, and comes after all
  uint64_t clusters_run;
  char failure[1024];  // empty as long as there is none
} grid;

struct Cluster {
  unsigned blocks, block_threads;
  unsigned threads, alive;
  unsigned arrived;   // threads, at its barrier under way
  unsigned barriers;  // passed so far
  std::unique_ptr<Tokens> tokens;
  std::minstd_rand random;
} cluster;

// TSan knows addresses of atomics by these, sixty-four buckets of them.
std::array<uint64_t, 64> atomic_tokens;

std::vector<Thread> threads;
std::vector<Fiber> fibers;  // [kFiberSets, kMaxThreads]
std::array<Block, kMaxClusterBlocks> blocks;
std::array<Warp, kMaxWarps> warps;
ReadySet ready;
SharedMemory shared;
Fiber host;
char* stacks = nullptr;
constexpr size_t kStackPitch = kPage + kStackBytes;  // an inaccessible page below each
Thread* self = nullptr;                              // null: the host runs

[[noreturn]] void leave_grid() {
  if (!self) throw std::runtime_error(grid.failure);
  Fiber& from = *self->fiber;
  self = nullptr;
  release(&grid.exit_token);
  switch_fiber(from, host, /*for_ever=*/true);
  __builtin_unreachable();
}

// "in __shfl_sync (file.cu:12), mask 0xffffffff". No std::string: nothing frees what an abandoned fiber holds.
struct Text {
  char text[160];
};
Text whereabouts(const Thread& thread) {
  const char* const slash = std::strrchr(thread.place.file, '/');
  const char* const file = slash ? slash + 1 : thread.place.file;
  Text result;
  if (thread.state == State::kInWarpOperation) {
    std::snprintf(result.text, sizeof(result.text), "in %s (%s:%d), mask 0x%08x", thread.operation->name, file,
                  thread.place.line, thread.mask);
  } else {
    const char* const barrier = thread.state == State::kAtBarrier ? "__syncthreads" : "barrier.cluster.wait";
    std::snprintf(result.text, sizeof(result.text), "in %s (%s:%d)", barrier, file, thread.place.line);
  }
  return result;
}

unsigned in_block(const Thread& thread) { return thread.linear - thread.block->first_thread; }

[[noreturn]] void report_deadlock() {
  const Thread* waiting = threads.data();
  while (waiting->state == State::kExited) ++waiting;
  const uint3 b = waiting->block->index;
  fail("deadlock: no thread can run; thread %u of block (%u, %u, %u) waits %s", in_block(*waiting), b.x, b.y, b.z,
       whereabouts(*waiting).text);
}

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

// The thread that lets others go on need not go on first.
void maybe_yield() {
  if (grid.order == Order::kRandom) run_next();
}

bool same_place(Place a, Place b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

unsigned warps_per_block() { return (cluster.block_threads + 31) / 32; }

void converge_warps_of(const Block& block) {
  for (unsigned warp = 0; warp < warps_per_block(); ++warp) converged(block.rank * warps_per_block() + warp);
}

void release_barrier_if_all_arrived(Block& block) {
  if (block.at_barrier == 0 || block.at_barrier < block.alive) return;
  Thread* const begin = &threads[block.first_thread];
  Thread* const end = begin + cluster.block_threads;
  const Thread* first = nullptr;
  for (const Thread* thread = begin; thread != end; ++thread) {
    if (thread->state != State::kAtBarrier) continue;
    if (!first) first = thread;
    if (!same_place(thread->place, first->place)) {
      fail("divergent barrier: thread %u waits %s, thread %u waits %s", in_block(*first), whereabouts(*first).text,
           in_block(*thread), whereabouts(*thread).text);
    }
  }
  for (Thread* thread = begin; thread != end; ++thread) {
    if (thread->state != State::kAtBarrier) continue;
    thread->barrier_result = block.predicates;
    make_ready(*thread);
  }
  block.at_barrier = 0;
  block.predicates = 0;
  ++block.barriers;
  converge_warps_of(block);
}

void release_cluster_barrier() {
  cluster.arrived = 0;
  ++cluster.barriers;
  for (unsigned rank = 0; rank < cluster.blocks; ++rank) blocks[rank].arrived = 0;
  for (unsigned i = 0; i < cluster.threads; ++i) {
    if (threads[i].state == State::kAtClusterBarrier) make_ready(threads[i]);
  }
}

void finish_operation(Warp& warp, const Thread& last) {
  const void* in[32] = {};
  void* out[32] = {};
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(last.mask >> lane & 1)) continue;
    const Thread& thread = threads[warp.first + lane];
    if (thread.operation != last.operation || thread.mask != last.mask || !same_place(thread.place, last.place)) {
      fail("divergent warp: lane %u waits %s; lane %u waits %s", last.lane, whereabouts(last).text, lane,
           whereabouts(thread).text);
    }
    in[lane] = thread.in;
    out[lane] = thread.out;
  }
  if (last.operation->compute) last.operation->compute(in, out, last.mask);
  warp.waiting &= ~last.mask;
  ++warp.meetings[static_cast<unsigned>(__builtin_ctz(last.mask))];
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (last.mask >> lane & 1) make_ready(threads[warp.first + lane]);
  }
  if (static_cast<unsigned>(__builtin_popcount(last.mask | warp.exited)) == warp.lanes) converged(last.warp);
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
  if (--block.alive == 0) shared.end_block(block.rank);
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

int block_barrier(int predicate, Place place) {
  Thread& thread = *self;
  Block& block = *thread.block;
  const char* const token = &cluster.tokens->barrier[block.rank][block.barriers % 2];
  release(token);
  make_wait(thread, State::kAtBarrier, place);
  ++block.at_barrier;
  block.predicates += predicate != 0;
  release_barrier_if_all_arrived(block);
  if (thread.state == State::kReady) {
    maybe_yield();
  } else {
    run_next();
  }
  acquire(token);
  return thread.barrier_result;
}

void cluster_arrive(bool orders_memory, Place place) {
  static const WarpOperation kArrive{"barrier.cluster.arrive", nullptr, false, false};
  if (!device_has_clusters()) fail("barrier.cluster needs compute capability 9.0");
  rendezvous(kArrive, 0xffffffffu, nullptr, nullptr, place);
  Thread& thread = *self;
  Block& block = *thread.block;
  if (thread.arrivals != thread.waits) fail("arrives twice at a cluster barrier without waiting in between");
  if (cluster.alive < cluster.threads) {
    fail("divergent cluster barrier: %u threads of the cluster have exited", cluster.threads - cluster.alive);
  }
  if (block.arrived++ == 0) block.arrived_from = place;
  if (!same_place(place, block.arrived_from)) {
    fail("divergent cluster barrier: threads of the block arrive in lines %d and %d", block.arrived_from.line,
         place.line);
  }
  if (orders_memory) release(&cluster.tokens->cluster[thread.arrivals % 2]);
  ++thread.arrivals;
  if (++cluster.arrived == cluster.threads) release_cluster_barrier();
}

void cluster_wait(Place place) {
  static const WarpOperation kWait{"barrier.cluster.wait", nullptr, false, false};
  rendezvous(kWait, 0xffffffffu, nullptr, nullptr, place);
  Thread& thread = *self;
  if (thread.arrivals == thread.waits) fail("waits for a cluster barrier at which it has not arrived");
  if (cluster.barriers < thread.arrivals) {
    make_wait(thread, State::kAtClusterBarrier, place);
    run_next();
  }
  acquire(&cluster.tokens->cluster[thread.waits++ % 2]);
}

void* in_block_of_cluster(void* address, unsigned rank) {
  if (!device_has_clusters()) fail("mapa needs compute capability 9.0");
  if (rank >= cluster.blocks) fail("mapa: block %u of a cluster of %u", rank, cluster.blocks);
  if (!is_own_shared(address)) fail("mapa: %p is not in shared memory of the block", address);
  return shared.in_block(address, rank);
}

void check_shared_access(const void* address, size_t bytes) {
  if (!is_peer_shared(address)) return;
  const auto rank = static_cast<unsigned>(shared.block_of(address));
  Block& owner = blocks[rank];
  if (rank >= cluster.blocks || !shared.holds(address, bytes)) {
    fail("access to %zu bytes at %p, outside shared memory of block %u of the cluster", bytes, address, rank);
  }
  if (self->waits == 0) fail("access to block %u of the cluster, which no cluster barrier has shown to run", rank);
  if (owner.alive == 0) fail("access to shared memory of block %u of the cluster, which has exited", rank);
  owner.lent_until = std::max(owner.lent_until, self->arrivals + 1);
}

void rendezvous(const WarpOperation& operation, uint32_t mask, const void* in, void* out, Place place) {
  Thread& thread = *self;
  Warp& warp = warps[thread.warp];
  if (!(mask >> thread.lane & 1)) fail("%s: lane %u is not in its mask 0x%08x", operation.name, thread.lane, mask);
  if (warp.lanes < 32) {
    if (operation.needs_full_warp) fail("%s: this warp has only %u threads", operation.name, warp.lanes);
    mask &= (1u << warp.lanes) - 1;
  }
  if (warp.exited & mask) {
    fail("%s: lanes 0x%08x of its mask 0x%08x have exited", operation.name, warp.exited & mask, mask);
  }
  thread.operation = &operation;
  thread.mask = mask;
  thread.in = in;
  thread.out = out;
  const unsigned leader = static_cast<unsigned>(__builtin_ctz(mask));
  const char* const token = &cluster.tokens->warp[thread.warp][leader][warp.meetings[leader] % 2];
  if (operation.orders_memory) release(token);
  make_wait(thread, State::kInWarpOperation, place);
  warp.waiting |= 1u << thread.lane;
  if ((warp.waiting & mask) == mask) {
    finish_operation(warp, thread);
    maybe_yield();
  } else {
    run_next();
  }
  if (operation.orders_memory) acquire(token);
}

// What precedes a fence, an atomic in global memory, another block's atomic at the same address and a fence there come
// in this order. Fences and atomics count for the whole block, as the threads of a block meet at barriers between them;
// one that relies on a fence of another thread without a barrier is not found out.
void fence() {
  Block& block = *self->block;
  block.fenced = true;
  for (size_t bucket = 0; bucket < atomic_tokens.size(); ++bucket) {
    if (block.atomics >> bucket & 1) acquire(&atomic_tokens[bucket]);
  }
}

void atomic_order(const void* address) {
  if (is_shared(address)) return;
  const size_t bucket = (reinterpret_cast<uintptr_t>(address) / 4 * 0x9e3779b9u >> 16) % atomic_tokens.size();
  Block& block = *self->block;
  block.atomics |= uint64_t{1} << bucket;
  if (block.fenced) release(&atomic_tokens[bucket]);
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
  grid = {name, grid_size_, cluster_size, block_size_, body, call, current_settings.order, 0, 0, 0, {}};
  check_launch(shared_bytes);
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
