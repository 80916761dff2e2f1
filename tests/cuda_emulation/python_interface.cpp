// The interface of the tests through ctypes: settings of the emulator, and its counts as JSON.
#include <sstream>
#include <string>
#include <vector>

#include "emulator.h"
#include "emulator_counters.h"

namespace {

using lpd::emulator::GlobalCount;
using lpd::emulator::SharedCount;

std::ostream& operator<<(std::ostream& out, const dim3& size) {
  return out << '[' << size.x << ", " << size.y << ", " << size.z << ']';
}

std::ostream& operator<<(std::ostream& out, const GlobalCount& count) {
  return out << R"({"requests": )" << count.requests << R"(, "bytes": )" << count.bytes << R"(, "sectors": )"
             << count.sectors << '}';
}

std::ostream& operator<<(std::ostream& out, const SharedCount& count) {
  return out << R"({"requests": )" << count.requests << R"(, "bytes": )" << count.bytes << R"(, "wavefronts": )"
             << count.wavefronts << R"(, "conflict_free": )" << count.conflict_free_wavefronts << '}';
}

std::ostream& operator<<(std::ostream& out, const lpd::emulator::RangeCounts& range) {
  return out << '"' << range.name << R"(": {"read": )" << range.read << R"(, "copied": )" << range.copied
             << R"(, "written": )" << range.written << R"(, "atomic": )" << range.atomic << R"(, "prefetched": )"
             << range.prefetched << R"(, "distinct_read": )" << range.distinct_bytes_read << R"(, "distinct_written": )"
             << range.distinct_bytes_written << R"(, "moved": )" << range.bytes_moved() << '}';
}

std::ostream& operator<<(std::ostream& out, const lpd::emulator::LaunchCounts& launch) {
  out << R"({"kernel": ")" << launch.kernel << R"(", "grid": )" << launch.grid << R"(, "cluster": )" << launch.cluster
      << R"(, "block": )" << launch.block << R"(, "copying_blocks": )" << launch.copying_blocks
      << R"(, "shared_bytes": )" << launch.shared_bytes << R"(, "global": {)";
  for (size_t i = 0; i < launch.global.size(); ++i) out << (i ? ", " : "") << launch.global[i];
  return out << R"(}, "shared": {"all": )" << launch.shared() << R"(, "read": )" << launch.shared_read
             << R"(, "matrix_read": )" << launch.matrix_read << R"(, "copied": )" << launch.shared_copied
             << R"(, "written": )" << launch.shared_written << R"(, "atomic": )" << launch.shared_atomic
             << R"(, "peer_read": )" << launch.peer_read << R"(, "peer_written": )" << launch.peer_written << "}}";
}

}  // namespace

#define LPD_EXPORT extern "C" __attribute__((visibility("default")))

LPD_EXPORT void lpd_emulator_configure(int order, uint64_t seed, int multiprocessors, int compute_capability,
                                       int64_t shared_limit) {
  lpd::emulator::settings() = {static_cast<lpd::emulator::Order>(order), seed, multiprocessors, compute_capability,
                               static_cast<size_t>(shared_limit),        false};
}

LPD_EXPORT void lpd_emulator_follow_launches(int on) {
  lpd::emulator::settings().launches_follow = on != 0;
  lpd::emulator::forget_launches();
}

LPD_EXPORT void lpd_emulator_start_counting(int ranges, const char* const* names, const void* const* addresses,
                                            const int64_t* bytes) {
  std::vector<lpd::emulator::Range> named;
  for (int i = 0; i < ranges; ++i) named.push_back({names[i], addresses[i], static_cast<size_t>(bytes[i])});
  lpd::emulator::start_counting(named);
}

// JSON list of the launches, valid until the next call.
LPD_EXPORT const char* lpd_emulator_stop_counting() {
  static std::string text;
  std::ostringstream out;
  const auto launches = lpd::emulator::stop_counting();
  out << '[';
  for (size_t i = 0; i < launches.size(); ++i) out << (i ? ", " : "") << launches[i];
  out << ']';
  text = out.str();
  return text.c_str();
}
