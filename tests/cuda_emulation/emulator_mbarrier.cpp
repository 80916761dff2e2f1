// Barriers in shared memory that count arrivals and bytes (mbarrier), and the stores to blocks of the cluster whose
// bytes they count (st.async).
//
// A store may arrive at any time until the barrier completes. Here it spoils its target at once and arrives when
// somebody waits for the barrier, so both ends of what hardware may do are tested.
#include <cstring>

#include "emulator_state.h"

namespace lpd::emulator {
namespace {

constexpr unsigned kMaxBarriers = 32, kMaxStores = 4096;  // of a cluster; on their way to one barrier
constexpr uint64_t kMark = 0x6d62617272696572;            // lies where the barrier does

}  // namespace

struct Mbarrier {
  char* address;
  Block* block;
  unsigned arrivals;          // that make a phase
  unsigned arrivals_to_come;  // of this phase
  int64_t bytes_to_come;      // below 0: more have come than are expected so far
  unsigned phase;
  unsigned waiting;  // threads
  bool shown;        // to the cluster
  unsigned first, last;
  char tokens[2];  // by phase, for TSan
  std::array<ClusterStore, kMaxStores> stores;
};

namespace {

std::array<Mbarrier, kMaxBarriers> barriers;
unsigned num_barriers = 0;

Mbarrier* find(const void* address) {
  for (unsigned i = 0; i < num_barriers; ++i) {
    if (barriers[i].address == address) return &barriers[i];
  }
  return nullptr;
}

Mbarrier& barrier_at(void* address) {
  Mbarrier* const barrier = find(address);
  if (!barrier) fail("no mbarrier has been initialised at %p", address);
  uint64_t mark;
  std::memcpy(&mark, address, sizeof(mark));
  if (mark != kMark) fail("the mbarrier at %p has been overwritten", address);
  return *barrier;
}

Mbarrier& own_barrier_at(void* address) {
  if (!is_own_shared(address)) fail("mbarrier: %p is not in shared memory of the block", address);
  return barrier_at(address);
}

void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.arrivals_to_come > 0 || barrier.bytes_to_come != 0) return;
  ++barrier.phase;
  barrier.arrivals_to_come = barrier.arrivals;
  for (unsigned i = 0; i < cluster.block_threads; ++i) {
    Thread& thread = threads[barrier.block->first_thread + i];
    if (thread.state == State::kAtMbarrier && thread.barrier == &barrier) make_ready(thread);
  }
}

}  // namespace

void forget_mbarriers() { num_barriers = 0; }

void mbarrier_init(void* address, unsigned arrivals) {
  if (!device_has_clusters()) fail("mbarrier needs compute capability 9.0");
  if (reinterpret_cast<uintptr_t>(address) % 8 != 0) fail("misaligned mbarrier at %p", address);
  if (!is_own_shared(address)) fail("mbarrier: %p is not in shared memory of the block", address);
  if (find(address)) fail("mbarrier at %p initialised twice", address);
  if (num_barriers == kMaxBarriers) fail("more than %u mbarriers in a cluster", kMaxBarriers);
  Mbarrier& barrier = barriers[num_barriers++];
  barrier.address = static_cast<char*>(address);
  barrier.block = self->block;
  barrier.arrivals = barrier.arrivals_to_come = arrivals;
  barrier.bytes_to_come = 0;
  barrier.phase = barrier.waiting = barrier.first = barrier.last = 0;
  barrier.shown = false;
  std::memcpy(address, &kMark, sizeof(kMark));
}

void show_mbarriers() {
  for (unsigned i = 0; i < num_barriers; ++i) barriers[i].shown |= barriers[i].block == self->block;
}

void mbarrier_arrive(void* address, unsigned bytes) {
  Mbarrier& barrier = own_barrier_at(address);
  if (barrier.arrivals_to_come == 0) fail("more than %u arrivals at the mbarrier at %p", barrier.arrivals, address);
  release(&barrier.tokens[barrier.phase % 2]);
  barrier.bytes_to_come += bytes;
  --barrier.arrivals_to_come;
  end_phase_if_complete(barrier);
}

void begin_cluster_store(void* to, void* barrier_address) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) fail("st.async: misaligned target %p", to);
  check_runs(to, 16);
  if (shared_rank(to) != shared_rank(barrier_address)) fail("st.async: target and mbarrier are of different blocks");
  const Mbarrier& barrier = barrier_at(barrier_address);
  if (!barrier.shown && barrier.block != self->block) {
    fail("st.async: no fence has shown the mbarrier's initialisation to the cluster");
  }
}

bool end_cluster_store(const ClusterStore& store, void* barrier_address) {
  Mbarrier& barrier = barrier_at(barrier_address);
  release(&barrier.tokens[barrier.phase % 2]);  // what was spoilt is written again by the thread that lets it arrive
  if (barrier.last - barrier.first == kMaxStores) fail("more than %u st.async in flight", kMaxStores);
  barrier.stores[barrier.last++ % kMaxStores] = store;
  return barrier.waiting > 0;
}

bool pop_cluster_store(void* barrier_address, ClusterStore* store) {
  Mbarrier& barrier = barrier_at(barrier_address);
  if (barrier.first == barrier.last) return false;
  *store = barrier.stores[barrier.first++ % kMaxStores];
  return true;
}

void cluster_store_has_arrived(void* barrier_address) {
  Mbarrier& barrier = barrier_at(barrier_address);
  release(&barrier.tokens[barrier.phase % 2]);
  barrier.bytes_to_come -= 16;
  end_phase_if_complete(barrier);
}

bool mbarrier_passed(void* address, unsigned parity) {
  const Mbarrier& barrier = own_barrier_at(address);
  acquire(&barrier.tokens[parity]);
  return barrier.phase % 2 != parity;
}

void mbarrier_wait(void* address, unsigned parity, Place place) {
  Mbarrier& barrier = own_barrier_at(address);
  if (barrier.phase % 2 == parity) {
    self->barrier = &barrier;
    make_wait(*self, State::kAtMbarrier, place);
    ++barrier.waiting;
    run_next();
    --barrier.waiting;
  } else {
    maybe_yield();
  }
  acquire(&barrier.tokens[parity]);
}

void check_mbarriers_at_exit(const Block& block) {
  for (unsigned i = 0; i < num_barriers; ++i) {
    const Mbarrier& barrier = barriers[i];
    if (barrier.block != &block) continue;
    if (barrier.first != barrier.last) {
      fail("exits with %u st.async to its shared memory in flight", barrier.last - barrier.first);
    }
    if (barrier.bytes_to_come != 0) {
      fail("exits with an mbarrier that expects %lld more bytes", static_cast<long long>(barrier.bytes_to_come));
    }
  }
}

Missing missing_at(const Mbarrier& barrier) {
  return {barrier.arrivals_to_come, static_cast<long long>(barrier.bytes_to_come)};
}

}  // namespace lpd::emulator
