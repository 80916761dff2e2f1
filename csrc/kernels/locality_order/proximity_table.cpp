#include <cmath>

#include "locality_order/locality_order.h"

namespace lpd {

void set_proximity_threshold(LocalityOrderParams& params, double proximity_threshold) {
  const auto proximity = [](int edges, int corners) { return edges + corners / std::sqrt(2.0); };
  for (int edges = 0; edges <= 4; ++edges) {
    for (int corners = 0; corners <= 4; ++corners) {
      // All 25 values differ (sqrt 2 is irrational), so the number of smaller ones is a rank.
      uint8_t rank = 0;
      for (int e = 0; e <= 4; ++e) {
        for (int c = 0; c <= 4; ++c) rank += proximity(e, c) < proximity(edges, corners);
      }
      params.proximity_rank[edges][corners] = rank;
      params.is_near[edges][corners] = proximity(edges, corners) >= proximity_threshold;
    }
  }
}

}  // namespace lpd
