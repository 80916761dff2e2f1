#include "emulator_counters.h"

#include <algorithm>
#include <array>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "emulator_state.h"

namespace lpd::emulator {
namespace {

constexpr unsigned kLanes = 32;
constexpr uint64_t kSector = 32;

struct Request {
  uint32_t mask = 0;
  std::array<uintptr_t, kLanes> address;
};

struct Instruction {
  const void* site;
  uint32_t bytes;
  Access access;
  bool operator==(const Instruction& other) const {
    return site == other.site && bytes == other.bytes && access == other.access;
  }
};

struct HashInstruction {
  size_t operator()(const Instruction& i) const {
    return reinterpret_cast<size_t>(i.site) * 31 + i.bytes * 7 + static_cast<size_t>(i.access);
  }
};

// Requests by one instruction since the lanes last met; `next` is the one a lane will take part in next.
struct Requests {
  std::array<uint32_t, kLanes> next{};
  std::vector<Request> requests;
};

struct CountedRange {
  uintptr_t begin, end;
  std::vector<bool> read, written;
};

struct Counting {
  std::vector<Range> ranges;
  std::vector<LaunchCounts> launches;
  std::vector<CountedRange> touched;  // by the launch under way
  std::unordered_set<uint64_t> copying_blocks;
  std::array<std::unordered_map<Instruction, Requests, HashInstruction>, kMaxWarps> pending;
};

thread_local bool counting_is_on = false;
thread_local bool in_counted_grid = false;
thread_local Counting counting;

bool is_write(Access access) { return access == Access::kWrite || access == Access::kAtomic; }

GlobalCount& global_count(RangeCounts& counts, Access access) {
  switch (access) {
    case Access::kCopyRead: return counts.copied;
    case Access::kWrite: return counts.written;
    case Access::kAtomic: return counts.atomic;
    case Access::kPrefetch: return counts.prefetched;
    default: return counts.read;
  }
}

SharedCount& shared_count(LaunchCounts& counts, Access access) {
  switch (access) {
    case Access::kMatrixRead: return counts.matrix_read;
    case Access::kCopyWrite: return counts.shared_copied;
    case Access::kWrite: return counts.shared_written;
    case Access::kAtomic: return counts.shared_atomic;
    case Access::kPeerRead: return counts.peer_read;
    case Access::kPeerWrite: return counts.peer_written;
    default: return counts.shared_read;
  }
}

uint64_t distinct(std::vector<uint64_t>& values) {
  std::sort(values.begin(), values.end());
  return static_cast<uint64_t>(std::unique(values.begin(), values.end()) - values.begin());
}

size_t range_of(uintptr_t address) {
  size_t range = 0;
  while (range < counting.touched.size() &&
         (address < counting.touched[range].begin || address >= counting.touched[range].end)) {
    ++range;
  }
  return range;  // past the last one: "other"
}

void touch(CountedRange& range, uintptr_t address, uint32_t bytes, Access access) {
  std::vector<bool>& map = is_write(access) ? range.written : range.read;
  const size_t first = address - range.begin, last = std::min(first + bytes, map.size());
  std::fill(map.begin() + static_cast<ptrdiff_t>(first), map.begin() + static_cast<ptrdiff_t>(last), true);
}

void count_global(const Request& request, const Instruction& instruction) {
  // Lanes of one request may go to different ranges: rows of a cache and of this step's tensor, say.
  std::array<size_t, kLanes> range;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (request.mask >> lane & 1) range[lane] = range_of(request.address[lane]);
  }
  std::vector<uint64_t> sectors;
  for (uint32_t left = request.mask; left != 0;) {
    const size_t r = range[static_cast<unsigned>(__builtin_ctz(left))];
    GlobalCount& count = global_count(counting.launches.back().global[r], instruction.access);
    sectors.clear();
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if (!(left >> lane & 1) || range[lane] != r) continue;
      left &= ~(1u << lane);
      const uintptr_t address = request.address[lane];
      for (uint64_t s = address / kSector; s <= (address + instruction.bytes - 1) / kSector; ++s) sectors.push_back(s);
      count.bytes += instruction.bytes;
      if (r < counting.touched.size() && instruction.access != Access::kPrefetch)
        touch(counting.touched[r], address, instruction.bytes, instruction.access);
    }
    count.requests += 1;
    count.sectors += distinct(sectors);
  }
}

void count_shared(const Request& request, const Instruction& instruction) {
  constexpr unsigned kBanks = 32, kBytesPerBank = 4;
  SharedCount& count = shared_count(counting.launches.back(), instruction.access);
  const unsigned lanes_per_phase = instruction.bytes <= 4 ? 32 : instruction.bytes <= 8 ? 16 : 8;
  count.requests += 1;
  for (unsigned first = 0; first < kLanes; first += lanes_per_phase) {
    std::vector<uint64_t> words;
    for (unsigned lane = first; lane < first + lanes_per_phase; ++lane) {
      if (!(request.mask >> lane & 1)) continue;
      count.bytes += instruction.bytes;
      const uintptr_t last = request.address[lane] + instruction.bytes - 1;
      for (uint64_t w = request.address[lane] / kBytesPerBank; w <= last / kBytesPerBank; ++w) words.push_back(w);
    }
    if (words.empty()) continue;
    words.resize(distinct(words));
    std::array<uint64_t, kBanks> words_of_bank{};
    for (const uint64_t word : words) ++words_of_bank[word % kBanks];
    count.wavefronts += *std::max_element(words_of_bank.begin(), words_of_bank.end());
    count.conflict_free_wavefronts += 1;
  }
}

void add(SharedCount& sum, const SharedCount& part) {
  sum.requests += part.requests;
  sum.bytes += part.bytes;
  sum.wavefronts += part.wavefronts;
  sum.conflict_free_wavefronts += part.conflict_free_wavefronts;
}

}  // namespace

SharedCount LaunchCounts::shared() const {
  SharedCount sum;
  for (const SharedCount* part :
       {&shared_read, &matrix_read, &shared_copied, &shared_written, &shared_atomic, &peer_read, &peer_written}) {
    add(sum, *part);
  }
  return sum;
}

void start_counting(std::vector<Range> ranges) {
  counting.ranges = std::move(ranges);
  counting.launches.clear();
  counting_is_on = true;
}

std::vector<LaunchCounts> stop_counting() {
  counting_is_on = false;
  return std::exchange(counting.launches, {});
}

void begin_counted_grid(const char* name, dim3 grid_dim, dim3 cluster_dim, dim3 block_dim) {
  if (!counting_is_on) return;
  LaunchCounts launch{};
  launch.kernel = name;
  launch.grid = grid_dim;
  launch.cluster = cluster_dim;
  launch.block = block_dim;
  counting.touched.clear();
  counting.copying_blocks.clear();
  for (const Range& range : counting.ranges) {
    launch.global.push_back({range.name, {}, {}, {}, {}, 0, 0});
    const uintptr_t begin = reinterpret_cast<uintptr_t>(range.address);
    counting.touched.push_back(
        {begin, begin + range.bytes, std::vector<bool>(range.bytes), std::vector<bool>(range.bytes)});
  }
  launch.global.push_back({"other", {}, {}, {}, {}, 0, 0});
  counting.launches.push_back(std::move(launch));
  in_counted_grid = true;
}

void end_counted_grid(size_t shared_bytes) {
  if (!in_counted_grid) return;
  in_counted_grid = false;
  LaunchCounts& launch = counting.launches.back();
  launch.shared_bytes = shared_bytes;
  launch.copying_blocks = counting.copying_blocks.size();
  const auto size = [](const std::vector<bool>& map) {
    return static_cast<uint64_t>(std::count(map.begin(), map.end(), true));
  };
  for (size_t range = 0; range < counting.touched.size(); ++range) {
    launch.global[range].distinct_bytes_read = size(counting.touched[range].read);
    launch.global[range].distinct_bytes_written = size(counting.touched[range].written);
  }
  for (auto& warp : counting.pending) warp.clear();
}

void converged(unsigned warp) {
  if (!in_counted_grid) return;
  for (auto& [instruction, pending] : counting.pending[warp]) {
    for (const Request& request : pending.requests) {
      if (request.mask == 0) continue;
      const unsigned lane = static_cast<unsigned>(__builtin_ctz(request.mask));
      if (is_shared(reinterpret_cast<const void*>(request.address[lane]))) {
        count_shared(request, instruction);
      } else {
        count_global(request, instruction);
      }
    }
    pending.requests.clear();
    pending.next.fill(0);
  }
}

// A null address is that of a lane that takes part in the request without accessing anything.
void count_access(const void* site, const void* address, size_t bytes, Access access) {
  if (!in_counted_grid || is_private(address)) return;
  if (is_peer_shared(address)) access = is_write(access) ? Access::kPeerWrite : Access::kPeerRead;
  if (access == Access::kCopyRead && address) {
    const uint3 block = block_index();
    const dim3 size = grid_size();
    counting.copying_blocks.insert((uint64_t{block.z} * size.y + block.y) * size.x + block.x);
  }
  const unsigned me = lane();
  Requests& pending = counting.pending[warp()][{site, static_cast<uint32_t>(bytes), access}];
  const uint32_t occurrence = pending.next[me]++;
  if (occurrence >= pending.requests.size()) pending.requests.resize(occurrence + 1);
  if (!address) return;
  Request& request = pending.requests[occurrence];
  request.mask |= 1u << me;
  request.address[me] = reinterpret_cast<uintptr_t>(address);
}

}  // namespace lpd::emulator
