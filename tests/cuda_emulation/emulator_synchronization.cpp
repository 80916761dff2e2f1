// Synchronisation of threads: barriers of a block and of a cluster, operations of a warp, and the guarantees of fences
// and atomics (emulator_mbarrier.cpp has mbarriers). TSan knows of an order only through release() and acquire() here.
#include <cstdio>
#include <cstring>

#include "emulator_counters.h"
#include "emulator_state.h"

namespace lpd::emulator {
namespace {

// TSan knows addresses of atomics by these, sixty-four buckets of them.
std::array<uint64_t, 64> atomic_tokens;

bool same_place(Place a, Place b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

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

}  // namespace

Text whereabouts(const Thread& thread) {
  const char* const slash = std::strrchr(thread.place.file, '/');
  const char* const file = slash ? slash + 1 : thread.place.file;
  Text result;
  if (thread.state == State::kInWarpOperation) {
    std::snprintf(result.text, sizeof(result.text), "in %s (%s:%d), mask 0x%08x", thread.operation->name, file,
                  thread.place.line, thread.mask);
  } else if (thread.state == State::kAtMbarrier) {
    const Missing missing = missing_at(*thread.barrier);
    std::snprintf(result.text, sizeof(result.text), "in mbarrier.try_wait (%s:%d), for %u arrivals and %lld bytes",
                  file, thread.place.line, missing.arrivals, missing.bytes);
  } else {
    const char* const barrier = thread.state == State::kAtBarrier ? "__syncthreads" : "barrier.cluster.wait";
    std::snprintf(result.text, sizeof(result.text), "in %s (%s:%d)", barrier, file, thread.place.line);
  }
  return result;
}

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
  if (orders_memory) {
    release(&cluster.tokens->cluster[thread.arrivals % 2]);
    show_mbarriers();
  }
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

// Accesses before a fence, an atomic in global memory, another block's atomic at the same address and a fence there are
// ordered. Fences and atomics count for the whole block, as its threads meet at barriers in between; a thread that
// relies on another thread's fence without a barrier is not detected.
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

}  // namespace lpd::emulator
