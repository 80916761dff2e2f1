// Counts what emulated kernels move. Only kernels compiled to be counted (emulator.h says how) report plain accesses.
//
// The unit is the request: what the lanes of a warp access by one instruction. Which accesses of different lanes belong
// together is told by the instruction, the meetings of the whole warp that lie before it, and how often the lane has
// executed it since the last one. So lanes that skip an instruction while others repeat it are taken for lanes that
// execute it early, which can only merge requests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "emulated_types.h"

namespace lpd::emulator {

struct GlobalCount {
  uint64_t requests = 0;
  uint64_t bytes = 0;    // asked for by lanes
  uint64_t sectors = 0;  // of 32 bytes, each counted once per request
};

// Traffic from and to one range of global memory.
struct RangeCounts {
  std::string name;
  GlobalCount read, copied, written, atomic;  // copied: by cp.async
  GlobalCount prefetched;               // into L2, a lane's sector standing for its line; moves nothing to a block
  uint64_t distinct_bytes_read = 0;     // copies included
  uint64_t distinct_bytes_written = 0;  // atomics included

  uint64_t bytes_moved() const { return 32 * (read.sectors + copied.sectors + written.sectors + atomic.sectors); }
};

struct SharedCount {
  uint64_t requests = 0;
  uint64_t bytes = 0;
  // Lanes are served in phases of 32, 16 or 8 for accesses of up to 4, 8 or 16 bytes; a wavefront serves one word of
  // each of the 32 banks. Without bank conflicts a phase takes one.
  uint64_t wavefronts = 0;
  uint64_t conflict_free_wavefronts = 0;
};

struct LaunchCounts {
  std::string kernel;
  dim3 grid, cluster, block;
  uint64_t copying_blocks;          // that issued a cp.async from global memory
  size_t shared_bytes;              // per block, dynamic and static
  std::vector<RangeCounts> global;  // the ranges in the order given, then "other"
  SharedCount shared_read, matrix_read, shared_copied, shared_written, shared_atomic;  // matrix_read: by ldmatrix
  SharedCount peer_read, peer_written;  // distributed shared memory: of another block of the cluster

  SharedCount shared() const;  // all of them
};

struct Range {
  std::string name;
  const void* address;
  size_t bytes;
};

// Counts launches of this thread from here on. An address in several ranges counts for the first of them.
void start_counting(std::vector<Range> ranges);

// The launches since start_counting, in order; counting is off again.
std::vector<LaunchCounts> stop_counting();

// ---- For the runtime ----
void begin_counted_grid(const char* name, dim3 grid_dim, dim3 cluster_dim, dim3 block_dim);
void end_counted_grid(size_t shared_bytes);
void converged(unsigned warp);  // the lanes of this warp have met: what requests they made are complete

}  // namespace lpd::emulator
