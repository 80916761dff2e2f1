#include "common/segment.h"

#include <sstream>
#include <vector>

namespace lpd {

std::string check_segments(const Segment* segments, int64_t num_segments, const SegmentLimits& limits) {
  std::vector<char> owned(static_cast<size_t>(limits.num_rows), 0);
  std::vector<char> slot_used(static_cast<size_t>(limits.cache_slots), 0);
  std::ostringstream message;
  for (int64_t i = 0; i < num_segments; ++i) {
    const Segment& s = segments[i];
    message << "segments[" << i << "]: ";
    if (s.num_context < 0 || s.num_query < 0 || s.cache_length < 0) {
      message << "num_context " << s.num_context << ", num_query " << s.num_query << " and cache_length "
              << s.cache_length << " must be >= 0";
      return message.str();
    }
    if (s.cache_slot < 0 || s.cache_slot >= limits.cache_slots) {
      message << "cache_slot " << s.cache_slot << " must be in [0, " << limits.cache_slots << ")";
      return message.str();
    }
    if (slot_used[static_cast<size_t>(s.cache_slot)]++) {
      message << "cache_slot " << s.cache_slot << " is used by an earlier segment of the same call";
      return message.str();
    }
    const int64_t appended_end = int64_t{s.cache_length} + s.num_context;
    if (appended_end > limits.cache_positions) {
      message << "cache_length + num_context = " << appended_end << " exceeds the cache's " << limits.cache_positions
              << " positions";
      return message.str();
    }
    if (int64_t{s.num_context} + s.num_query > limits.max_rows) {
      message << "num_context + num_query = " << int64_t{s.num_context} + s.num_query << " exceeds max_rows "
              << limits.max_rows;
      return message.str();
    }
    if (appended_end + s.num_query > limits.max_keys) {
      message << "cache_length + num_context + num_query = " << appended_end + s.num_query << " exceeds max_keys "
              << limits.max_keys;
      return message.str();
    }
    const int32_t starts[2] = {s.context_start, s.query_start};
    const int32_t counts[2] = {s.num_context, s.num_query};
    for (int part = 0; part < 2; ++part) {
      if (counts[part] == 0) continue;
      const int64_t end = int64_t{starts[part]} + counts[part];
      if (starts[part] < 0 || end > limits.num_rows) {
        message << (part == 0 ? "context" : "query") << " rows [" << starts[part] << ", " << end << ") must lie in [0, "
                << limits.num_rows << ")";
        return message.str();
      }
      for (int64_t row = starts[part]; row < end; ++row) {
        if (owned[static_cast<size_t>(row)]++) {
          message << "row " << row << " belongs to more than one segment or to context and query";
          return message.str();
        }
      }
    }
    message.str("");
  }
  for (int64_t row = limits.first_covered_row; row < limits.num_rows; ++row) {
    if (!owned[static_cast<size_t>(row)]) {
      message << "segments: row " << row << " belongs to no segment";
      return message.str();
    }
  }
  return {};
}

}  // namespace lpd
