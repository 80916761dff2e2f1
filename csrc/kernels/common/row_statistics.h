// What stands for a row between two linear layers whose LayerNorm is folded away: the row times the LayerNorm's weight,
// and mean and sum of squared deviations of every 32 columns.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace lpd {

constexpr int32_t kStatisticsColumns = 32;

namespace {

// On the CPU, for a row x [width]: scaled [width] and statistics [width / 32, 2].
template <class T>
void scale_row(const float* x, const T* scale, int32_t width, T* scaled, float* statistics) {
  for (int32_t first = 0; first < width; first += kStatisticsColumns, statistics += 2) {
    float sum = 0.0f, squares = 0.0f;
    for (int32_t n = first; n < first + kStatisticsColumns; ++n) {
      scaled[n] = from_float<T>(x[n] * to_float(scale[n]));
      sum += x[n];
    }
    const float mean = sum / kStatisticsColumns;
    for (int32_t n = first; n < first + kStatisticsColumns; ++n) squares += (x[n] - mean) * (x[n] - mean);
    statistics[0] = mean;
    statistics[1] = squares;
  }
}

}  // namespace
}  // namespace lpd
