#include "common/segment.h"

#include <algorithm>
#include <sstream>
#include <tuple>
#include <vector>

namespace lpd {
namespace {

struct Rows {
  int64_t begin, end;
  int64_t segment;
  bool operator<(const Rows& other) const { return begin < other.begin; }
};

// A fault of one segment on its own, or "".
std::string fault_of(const Segment& s, const SegmentLimits& limits) {
  std::ostringstream message;
  const int64_t appended_end = int64_t{s.cache_length} + s.num_context;
  if (s.num_context < 0 || s.num_query < 0 || s.cache_length < 0) {
    message << "num_context " << s.num_context << ", num_query " << s.num_query << " and cache_length "
            << s.cache_length << " must be >= 0";
  } else if (s.cache_slot < 0 || s.cache_slot >= limits.cache_slots) {
    message << "cache_slot " << s.cache_slot << " must be in [0, " << limits.cache_slots << ")";
  } else if (appended_end > limits.cache_positions) {
    message << "cache_length + num_context = " << appended_end << " exceeds the cache's " << limits.cache_positions
            << " positions";
  } else if (int64_t{s.num_context} + s.num_query > limits.max_rows) {
    message << "num_context + num_query = " << int64_t{s.num_context} + s.num_query << " exceeds max_rows "
            << limits.max_rows;
  } else if (appended_end + s.num_query > limits.max_keys) {
    message << "cache_length + num_context + num_query = " << appended_end + s.num_query << " exceeds max_keys "
            << limits.max_keys;
  }
  return message.str();
}

}  // namespace

// The work grows with the segments alone: rows and slots may be many where heads or positions are none.
std::string check_segments(const Segment* segments, int64_t num_segments, const SegmentLimits& limits) {
  std::vector<Rows> owned, slots;
  owned.reserve(static_cast<size_t>(2 * num_segments));
  slots.reserve(static_cast<size_t>(num_segments));
  std::ostringstream message;
  for (int64_t i = 0; i < num_segments; ++i) {
    const Segment& s = segments[i];
    message << "segments[" << i << "]: ";
    const std::string fault = fault_of(s, limits);
    if (!fault.empty()) return message.str() + fault;
    slots.push_back({s.cache_slot, s.cache_slot + int64_t{1}, i});
    for (const auto& [start, count, name] :
         {std::tuple{s.context_start, s.num_context, "context"}, std::tuple{s.query_start, s.num_query, "query"}}) {
      if (count == 0) continue;
      const int64_t end = int64_t{start} + count;
      if (start < 0 || end > limits.num_rows) {
        message << name << " rows [" << start << ", " << end << ") must lie in [0, " << limits.num_rows << ")";
        return message.str();
      }
      owned.push_back({start, end, i});
    }
    message.str("");
  }
  std::sort(slots.begin(), slots.end());
  for (size_t k = 1; k < slots.size(); ++k) {
    if (slots[k].begin < slots[k - 1].end) {
      message << "segments[" << std::max(slots[k].segment, slots[k - 1].segment) << "]: cache_slot " << slots[k].begin
              << " is used by an earlier segment of the same call";
      return message.str();
    }
  }
  std::sort(owned.begin(), owned.end());
  int64_t covered_end = limits.first_covered_row;
  for (size_t k = 0; k < owned.size(); ++k) {
    if (k > 0 && owned[k].begin < owned[k - 1].end) {
      message << "segments[" << std::max(owned[k].segment, owned[k - 1].segment) << "]: row " << owned[k].begin
              << " belongs to more than one segment or to context and query";
      return message.str();
    }
    if (owned[k].begin > covered_end) break;
    covered_end = std::max(covered_end, owned[k].end);
  }
  if (covered_end < limits.num_rows) {
    message << "segments: row " << covered_end << " belongs to no segment";
    return message.str();
  }
  return {};
}

}  // namespace lpd
