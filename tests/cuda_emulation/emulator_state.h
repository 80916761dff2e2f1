// State of the running grid, shared by the runtime's files: emulator.cpp runs blocks and threads,
// emulator_synchronization.cpp lets them wait for each other.
#pragma once

#include <array>
#include <memory>
#include <random>
#include <vector>

#include "emulator.h"
#include "fiber.h"
#include "ready_set.h"  // kMaxThreads
#include "shared_memory.h"

#ifdef LPD_EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace lpd::emulator {

#ifdef LPD_EMULATOR_TSAN
// To TSan, what a fiber did in an earlier cluster precedes what it does now. Making new fibers takes long; with three
// sets in turn a cluster is unordered with the two that ran before it.
constexpr unsigned kFiberSets = 3;
inline void release(const void* token) { __tsan_release(const_cast<void*>(token)); }
inline void acquire(const void* token) { __tsan_acquire(const_cast<void*>(token)); }
#else
constexpr unsigned kFiberSets = 1;
inline void release(const void*) {}
inline void acquire(const void*) {}
#endif

enum class State { kReady, kInWarpOperation, kAtBarrier, kAtClusterBarrier, kAtMbarrier, kExited };

struct Mbarrier;  // emulator_mbarrier.cpp

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
  bool waited_for_launch;
  unsigned arrivals, waits;  // halves of the cluster's barriers that it has come to
  const Mbarrier* barrier;   // that it waits for

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

struct Grid {
  const char* name;
  dim3 size, cluster_size, block_size;
  bool early;  // may begin before the launch before has ended
  void (*body)(const void*);
  const void* call;
  Order order;
  char start_token, exit_token;  // for TSan: what the host does precedes a block, and comes after all
  uint64_t clusters_run;
  char failure[1024];  // empty as long as there is none
};

struct Cluster {
  unsigned blocks, block_threads;
  unsigned threads, alive;
  unsigned arrived;   // threads, at its barrier under way
  unsigned barriers;  // passed so far
  std::unique_ptr<Tokens> tokens;
  std::minstd_rand random;
};

// One grid runs at a time, so there is one of everything.
inline Grid grid;
inline Cluster cluster;
inline std::vector<Thread> threads;
inline std::array<Block, kMaxClusterBlocks> blocks;
inline std::array<Warp, kMaxWarps> warps;
inline Thread* self = nullptr;  // null: the host runs

inline unsigned in_block(const Thread& thread) { return thread.linear - thread.block->first_thread; }
inline unsigned warps_per_block() { return (cluster.block_threads + 31) / 32; }

// ---- Whose turn it is (emulator.cpp) ----
void make_ready(Thread& thread);
void make_wait(Thread& thread, State state, Place place);
void run_next();     // comes back when it is the caller's turn again
void maybe_yield();  // the thread that lets others go on need not go on first

// ---- Waiting for each other (emulator_synchronization.cpp) ----
void release_barrier_if_all_arrived(Block& block);
void converge_warps_of(const Block& block);

void begin_launch();  // emulator_launches.cpp

// ---- mbarriers (emulator_mbarrier.cpp) ----
void forget_mbarriers();                           // of the cluster before
void check_mbarriers_at_exit(const Block& block);  // whose last thread exits
struct Missing {
  unsigned arrivals;
  long long bytes;
};
Missing missing_at(const Mbarrier& barrier);

// Rank of the block that owns an address in the cluster's shared memory, and the check that this block runs.
unsigned shared_rank(const void* address);
Block& check_runs(const void* address, size_t bytes);

// "in __shfl_sync (file.cu:12), mask 0xffffffff". No std::string: nothing frees what an abandoned fiber holds.
struct Text {
  char text[160];
};
Text whereabouts(const Thread& thread);

}  // namespace lpd::emulator
