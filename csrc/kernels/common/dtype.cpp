#include "common/dtype.h"

#include <stdexcept>
#include <string>

namespace lpd {

void throw_unknown(const char* what, int value) {
  throw std::runtime_error(std::string("unknown ") + what + " " + std::to_string(value));
}

}  // namespace lpd
