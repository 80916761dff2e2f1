// Operations of a whole warp, from the operands of each lane.
#include "emulated_intrinsics.h"
#include "emulated_ptx.h"

namespace lpd::emulator {
namespace {

bool has(uint32_t mask, int lane) { return mask >> lane & 1; }

void shuffle_lanes(const void* const in[32], void* const out[32], uint32_t mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!has(mask, lane)) continue;
    const int source = static_cast<const Shuffled*>(in[lane])->source;
    if (source < 0 || source > 31 || !has(mask, source)) {
      fail("shuffle: lane %d reads lane %d, which is not in the mask 0x%08x", lane, source, mask);
    }
    *static_cast<uint64_t*>(out[lane]) = static_cast<const Shuffled*>(in[source])->bits;
  }
}

uint64_t element(const void* in) { return *static_cast<const uint64_t*>(in); }

void ballot(const void* const in[32], void* const out[32], uint32_t mask) {
  uint64_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (has(mask, lane)) votes |= element(in[lane]) << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (has(mask, lane)) *static_cast<uint64_t*>(out[lane]) = votes;
  }
}

void match_any(const void* const in[32], void* const out[32], uint32_t mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!has(mask, lane)) continue;
    uint64_t equal = 0;
    for (int other = 0; other < 32; ++other) {
      if (has(mask, other) && element(in[other]) == element(in[lane])) equal |= uint64_t{1} << other;
    }
    *static_cast<uint64_t*>(out[lane]) = equal;
  }
}

template <class T, T (*kCombine)(T, T)>
void reduce_lanes(const void* const in[32], void* const out[32], uint32_t mask) {
  const int first = __builtin_ctz(mask);
  T result = static_cast<T>(element(in[first]));
  for (int lane = first + 1; lane < 32; ++lane) {
    if (has(mask, lane)) result = kCombine(result, static_cast<T>(element(in[lane])));
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (has(mask, lane)) *static_cast<uint64_t*>(out[lane]) = static_cast<uint64_t>(result);
  }
}

unsigned sum(unsigned a, unsigned b) { return a + b; }
template <class T>
T least(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T greatest(T a, T b) {
  return a < b ? b : a;
}
unsigned bit_and(unsigned a, unsigned b) { return a & b; }
unsigned bit_or(unsigned a, unsigned b) { return a | b; }
unsigned bit_xor(unsigned a, unsigned b) { return a ^ b; }

// Lane 8i + j brought row j of matrix i. Lane t gets elements 2(t % 4) and the next of row t / 4, or, transposed, of
// column t / 4.
template <bool kTransposed>
void load_matrices(const void* const in[32], void* const out[32], uint32_t) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto element_of = [&](int row, int column) {
        return uint32_t{static_cast<const uint16_t*>(in[8 * matrix + row])[column]};
      };
      const int a = lane / 4, b = 2 * (lane % 4);
      const uint32_t low = kTransposed ? element_of(b, a) : element_of(a, b);
      const uint32_t high = kTransposed ? element_of(b + 1, a) : element_of(a, b + 1);
      static_cast<uint32_t*>(out[lane])[matrix] = low | high << 16;
    }
  }
}

// Sums in fp32, k ascending; tensor cores keep other intermediate bits.
template <class T>
void multiply_matrices(const void* const in[32], void* const out[32], uint32_t) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaOperands& operands = *static_cast<const MmaOperands*>(in[lane]);
    const float* const accumulator = static_cast<const float*>(out[lane]);
    const int row = lane / 4, column = 2 * (lane % 4);
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < 4; ++r) {
        const uint16_t bits = static_cast<uint16_t>(operands.a[r] >> (16 * half));
        a[row + r % 2 * 8][column + r / 2 * 8 + half] = lpd::to_float(T{bits});
      }
      for (int r = 0; r < 2; ++r) {
        b[column + 8 * r + half][row] = lpd::to_float(T{static_cast<uint16_t>(operands.b[r] >> (16 * half))});
      }
      d[row][column + half] = accumulator[half];
      d[row + 8][column + half] = accumulator[2 + half];
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* const accumulator = static_cast<float*>(out[lane]);
    for (int i = 0; i < 4; ++i) accumulator[i] = d[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
  }
}

}  // namespace

const WarpOperation kSyncWarp{"__syncwarp", nullptr, true, false};
const WarpOperation kShuffle{"__shfl_sync", shuffle_lanes, false, false};
const WarpOperation kBallot{"__ballot_sync", ballot, false, false};
const WarpOperation kMatchAny{"__match_any_sync", match_any, false, false};
const WarpOperation kReduceAddInt{"__reduce_add_sync", reduce_lanes<unsigned, sum>, false, false};
const WarpOperation kReduceAdd{"__reduce_add_sync", reduce_lanes<unsigned, sum>, false, false};
const WarpOperation kReduceMinInt{"__reduce_min_sync", reduce_lanes<int, least<int>>, false, false};
const WarpOperation kReduceMin{"__reduce_min_sync", reduce_lanes<unsigned, least<unsigned>>, false, false};
const WarpOperation kReduceMaxInt{"__reduce_max_sync", reduce_lanes<int, greatest<int>>, false, false};
const WarpOperation kReduceMax{"__reduce_max_sync", reduce_lanes<unsigned, greatest<unsigned>>, false, false};
const WarpOperation kReduceAnd{"__reduce_and_sync", reduce_lanes<unsigned, bit_and>, false, false};
const WarpOperation kReduceOr{"__reduce_or_sync", reduce_lanes<unsigned, bit_or>, false, false};
const WarpOperation kReduceXor{"__reduce_xor_sync", reduce_lanes<unsigned, bit_xor>, false, false};
const WarpOperation kLoadMatrix{"ldmatrix", load_matrices<false>, false, true};
const WarpOperation kLoadMatrixTransposed{"ldmatrix.trans", load_matrices<true>, false, true};
const WarpOperation kMmaBFloat16{"mma.bf16", multiply_matrices<BFloat16>, false, true};
const WarpOperation kMmaFloat16{"mma.f16", multiply_matrices<Float16>, false, true};

}  // namespace lpd::emulator
