// The tables of a decode at one step, for sample_step: B images, each with its unconditional twin.
#pragma once

#include <cstdint>
#include <vector>

#include "bench_shapes.h"

namespace lpd::bench {

struct StepTablesData {
  StepTablesData(const Shape& shape, int32_t batch)
      : cells(int64_t{shape.schedule().height} * shape.schedule().width),
        images(batch),
        entries(2 * batch * (cells + 2)) {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t m = 0; m < shape.num_query; ++m) {
        const int64_t place = drawn_before(shape) + m;
        image.push_back(b);
        token_index.push_back(place);
        write_index.push_back(b * (cells + 2) + 1 + place);
        twin_index.push_back((batch + b) * (cells + 2) + 1 + place);
      }
    }
    for (int64_t slot = 0; slot < 2 * batch; ++slot) {
      for (int64_t column = 0; column < cells + 2; ++column) positions.push_back(std::min(column, cells));
    }
    contents.assign(static_cast<size_t>(entries), 0);
    grid.assign(static_cast<size_t>(batch * cells), -1);
    guidance.assign(grid.size(), 4.8f);
    temperature.assign(static_cast<size_t>(batch), 1.0f);
    top_k.assign(temperature.size(), 900);
    top_p.assign(temperature.size(), 0.95f);
    for (int64_t b = 0; b < batch; ++b) seed.push_back(b);
  }

  static int64_t drawn_before(const Shape& shape) { return int64_t{shape.cache_length} + shape.num_context - 1; }

  int64_t cells, images, entries;
  std::vector<int64_t> image, token_index, write_index, twin_index, positions, contents, grid, seed;
  std::vector<float> guidance, temperature, top_p;
  std::vector<int32_t> top_k;
};

// Arrays: of a device, with the names of StepTablesData and SampledRows.
template <class Arrays>
SampleTokensParams sample_step_params(const Arrays& arrays, const StepTablesData& sizes, bool filters, DType dtype) {
  SampleTokensParams p =
      sample_tokens_params(arrays, static_cast<int64_t>(sizes.image.size()), kVocab, filters, filters, dtype);
  p.guidance_stride = sizes.cells;
  p.tables = {arrays.image.data(),
              arrays.token_index.data(),
              arrays.write_index.data(),
              arrays.twin_index.data(),
              arrays.positions.data(),
              nullptr,
              nullptr,
              sizes.images,
              sizes.cells,
              sizes.entries};
  return p;
}

}  // namespace lpd::bench
