// preview_pixels on the CPU. One item is one image: rows of cells stand side by side in memory with a cell of zeros
// around, so the 3 x 3 cells under a row of a convolution are three overlapping matrices, which a product reads in
// place. The results of the second convolution and of the head are kept for one row of cells. Limited by the products;
// a preview of a small grid by its one call, which is why it is one.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/cpu_kernels.h"
#include "common/register_product.h"
#include "common/simd.h"

namespace lpd::LPD_ISA {
namespace {

constexpr int kWidth = Vec::kWidth;
constexpr uint8_t kGrey = 128;  // of 0 in [-1, 1]

// c[rows, columns] = a[rows, depth] b[depth, columns], added to c if `accumulate`; rows of a stand a_stride apart.
void product(int rows, const float* a, int64_t a_stride, const float* b, int depth, int columns, float* c,
             bool accumulate) {
  FetchNothing nothing;
  const int64_t stride = columns;
  const int vecs = columns / kWidth;
  multiply<Floats>(rows, vecs, Matrix{a, a_stride}, Matrix{b, stride}, depth, Matrix{c, stride}, accumulate, nothing);
  for (int column = vecs * kWidth; column < columns; ++column) {
    for (int64_t r = 0; r < rows; ++r) {
      float sum = accumulate ? c[r * stride + column] : 0.0f;
      for (int64_t k = 0; k < depth; ++k) sum += a[r * a_stride + k] * b[k * stride + column];
      c[r * stride + column] = sum;
    }
  }
}

// out[w, columns] = relu(row y of the convolution of x [h + 2, w + 2, channels]).
void convolve_row(const float* x, int64_t y, int cells, int channels, const float* weight, const float* bias,
                  int columns, float* out) {
  const int64_t row = (int64_t{cells} + 2) * channels, depth = int64_t{3} * channels;
  for (int64_t dy = 0; dy < 3; ++dy) {
    product(cells, x + (y + dy) * row, channels, weight + dy * depth * columns, static_cast<int>(depth), columns, out,
            dy > 0);
  }
  for (int64_t cell = 0; cell < cells; ++cell) {
    float* const sums = out + cell * columns;
    for (int64_t k = 0; k < columns; ++k) {
      const float sum = sums[k] + bias[k];
      sums[k] = sum < 0.0f ? 0.0f : sum;
    }
  }
}

// The unit vector of a code, and 1.
void write_code(const float* code, int length, float* to) {
  double squares = 0.0;
  for (int k = 0; k < length; ++k) squares += double{code[k]} * double{code[k]};
  const auto norm = static_cast<float>(std::max(std::sqrt(squares), 1e-12));
  for (int k = 0; k < length; ++k) to[k] = code[k] / norm;
  to[length] = 1.0f;
}

void write_pixels(const float* values, const float* bias, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = (values[i] + bias[i] + 1.0f) * 127.5f;
    const float inside = value > 0.0f ? (value < 255.0f ? value : 255.0f) : 0.0f;  // 0 for NaN
    to[i] = static_cast<uint8_t>(static_cast<int32_t>(__builtin_nearbyintf(inside)));
  }
}

}  // namespace

void preview_pixels(const PreviewPixelsParams& p, int64_t begin, int64_t end) {
  const int64_t height = p.height, cells = height * p.width, padded_row = int64_t{p.width} + 2;
  const int64_t padded = (height + 2) * padded_row, row_bytes = int64_t{3} * p.stride;
  const int channels = p.code_length + 1;
  const int64_t values_of_cell = p.stride * row_bytes;
  for (int64_t image = begin; image < end; ++image) {
    const int64_t* const tokens = p.tokens + image * cells;
    uint8_t* const pixels = p.pixels + image * cells * values_of_cell;
    float* const codes = p.workspace + image * preview_workspace_floats(p);
    float* const inner = codes + padded * channels;
    float* const outer = inner + padded * p.width1;
    float* const values = outer + int64_t{p.width} * p.width2;
    std::fill(codes, outer, 0.0f);
    for (int64_t y = 0; y < p.height; ++y) {
      for (int64_t x = 0; x < p.width; ++x) {
        const int64_t token = tokens[y * p.width + x];
        if (token < 0) continue;
        write_code(p.codebook + token * p.code_length, p.code_length,
                   codes + ((y + 1) * padded_row + x + 1) * channels);
      }
    }
    for (int64_t y = 0; y < p.height; ++y) {
      convolve_row(codes, y, p.width, channels, p.weight1, p.bias1, p.width1,
                   inner + ((y + 1) * padded_row + 1) * p.width1);
    }
    for (int64_t y = 0; y < p.height; ++y) {
      convolve_row(inner, y, p.width, p.width1, p.weight2, p.bias2, p.width2, outer);
      product(p.width, outer, p.width2, p.head, p.width2, static_cast<int>(values_of_cell), values, false);
      for (int64_t x = 0; x < p.width; ++x) {
        for (int64_t dy = 0; dy < p.stride; ++dy) {
          uint8_t* const to = pixels + ((y * p.stride + dy) * p.width + x) * row_bytes;
          if (tokens[y * p.width + x] < 0) {
            std::memset(to, kGrey, static_cast<size_t>(row_bytes));
          } else {
            write_pixels(values + x * values_of_cell + dy * row_bytes, p.head_bias + dy * row_bytes, row_bytes, to);
          }
        }
      }
    }
  }
}

}  // namespace lpd::LPD_ISA
