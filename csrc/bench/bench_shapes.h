// Shared by the microbenchmarks of all devices: the decoding steps to time and their arguments.
// tests/operators/test_bench_shapes.py compares the numbers with what lpd_ext plans.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "operator_params.h"

namespace lpd::bench {

// The published group sizes of a model, and the repulsion threshold of its orders.
struct Schedule {
  const char* name;
  int32_t height, width;
  int32_t repulsion_threshold;
  int32_t steps;            // T
  int32_t group_sizes[48];  // [T]
  constexpr GridSizes grid() const { return {height, width, steps, repulsion_threshold}; }
};

constexpr Schedule kSchedules[] = {
    {"L-256-20", 16, 16, 2, 20, {1, 2, 4, 5, 7, 8, 10, 11, 12, 14, 15, 16, 17, 18, 18, 19, 19, 20, 20, 20}},
    {"L-512-48", 32, 32, 4, 48, {1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16,
                                 17, 18, 19, 20, 21, 22, 23, 23, 24, 25, 26, 26, 27, 28, 28, 29,
                                 29, 30, 30, 31, 31, 32, 32, 32, 33, 33, 33, 33, 33, 33, 33, 34}}};

// A decoding step with guidance: batch B makes 2B sequences of these sizes.
struct Shape {
  const char* name;         // of its schedule, and the step counted from 0
  int32_t num_context;      // a
  int32_t num_query;        // m
  int32_t cache_length;     // c
  int32_t cache_positions;  // P
  int32_t schedule_index;
  const Schedule& schedule() const { return kSchedules[schedule_index]; }
};

constexpr Shape kShapes[] = {{"L-256-20 step 1", 1, 2, 1, 237, 0},
                             {"L-256-20 step 8", 11, 12, 38, 237, 0},
                             {"L-256-20 step 15", 18, 19, 141, 237, 0},
                             {"L-256-20 step 19", 20, 20, 217, 237, 0},
                             {"L-512-48 step 30", 28, 28, 428, 991, 1}};
constexpr int kHeads = 16, kHeadDim = 64, kWidth = kHeads * kHeadDim, kVocab = 16384, kClasses = 1002;

template <class T>
std::vector<T> random_ids(int64_t count, T end) {
  std::mt19937 generator(0);
  std::uniform_int_distribution<T> uniform(0, end - 1);
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = uniform(generator);
  return values;
}

// Equal segments of a step.
inline std::vector<Segment> make_segments(const Shape& shape, int32_t sequences) {
  const SequenceSizes sizes{shape.num_context, shape.num_query, shape.cache_length};
  return make_segments(std::vector<SequenceSizes>(static_cast<size_t>(sequences), sizes));
}

}  // namespace lpd::bench
