// One sequence's share of a decoding step: which rows it owns and where its cache stands.
#pragma once

#include <cstdint>
#include <string>

namespace lpd {

// Six int32 as torch passes them, [Q, 6]. Row ranges of different segments are disjoint; context rows stand before all
// query rows of the step. Either count may be zero.
struct Segment {
  int32_t context_start;
  int32_t num_context;
  int32_t query_start;
  int32_t num_query;
  int32_t cache_length;  // positions already cached; this step's context is appended at [cache_length, + num_context)
  int32_t cache_slot;
};
static_assert(sizeof(Segment) == 6 * sizeof(int32_t), "Segment must match a row of the int32 [Q, 6] tensor");

struct SegmentLimits {
  int64_t num_rows;           // R
  int64_t cache_slots;        // S
  int64_t cache_positions;    // P
  int64_t max_rows;           // upper bound of num_context + num_query, from the plan
  int64_t max_keys;           // upper bound of cache_length + num_context + num_query
  int64_t first_covered_row;  // rows from here on must belong to exactly one segment
};

// Returns an empty string if the segments are usable, else a sentence naming the first one that is not.
std::string check_segments(const Segment* segments, int64_t num_segments, const SegmentLimits& limits);

}  // namespace lpd
