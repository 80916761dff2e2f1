// conv3x3 on the CPU. A worker transforms the pixels of a block of up to 64 tiles, then takes one panel of 32 output
// channels after the other: 36 matrix products, whose results are transformed back while they are in L2. Weights are
// transformed anew in every call, which costs less than reading them four times as large. Limited by FMAs.
//
// F(4x4, 3x3) on the points 0, +-3/4, +-3/2 and infinity: a fifth of the multiplications' rounding error of a direct
// fp32 convolution is added per layer at +-1, +-2, a tenth here (error 1e-6 against 2e-6 of the result's deviation).
#include <algorithm>

#include "common/cpu_kernels.h"
#include "common/simd.h"

namespace lpd::LPD_ISA {
namespace {

constexpr int kWidth = Vec::kWidth;
#if defined(LPD_ISA_AVX512)
constexpr int kRows = 12, kVecs = 2;
#elif defined(LPD_ISA_AVX2)
constexpr int kRows = 6, kVecs = 2;
#else
constexpr int kRows = 4, kVecs = 8;
#endif
static_assert(kConvPanel % (kVecs * kWidth) == 0 && kConvPad % kWidth == 0);

// Points +-a and +-b; A2 is a squared.
constexpr float kA = 0.75f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB, kA3 = kA2 * kA, kB3 = kB2 * kB;

// out[6] of in[6], elements `in_stride` and `out_stride` apart: the polynomial bases of the points.
inline void transform_pixels(const Vec* in, Vec* out) {
  const Vec minus_sum = broadcast(-(kA2 + kB2)), product = broadcast(kA2 * kB2);
  const Vec minus_a2 = broadcast(-kA2), minus_b2 = broadcast(-kB2);
  const Vec even_a = fma(in[2], minus_b2, in[4]), odd_a = fma(in[1], minus_b2, in[3]);
  const Vec even_b = fma(in[2], minus_a2, in[4]), odd_b = fma(in[1], minus_a2, in[3]);
  out[0] = fma(in[0], product, fma(in[2], minus_sum, in[4]));
  out[1] = fma(odd_a, broadcast(kA), even_a);
  out[2] = fma(odd_a, broadcast(-kA), even_a);
  out[3] = fma(odd_b, broadcast(kB), even_b);
  out[4] = fma(odd_b, broadcast(-kB), even_b);
  out[5] = fma(in[1], product, fma(in[3], minus_sum, in[5]));
}

// The weights' polynomial at each point, over the derivative there of the points' polynomial.
inline void transform_weights(const Vec* in, Vec* out) {
  const Vec share_a = broadcast(1.0f / (2 * kA2 * (kA2 - kB2))), share_b = broadcast(1.0f / (2 * kB2 * (kB2 - kA2)));
  const Vec even_a = fma(in[2], broadcast(kA2), in[0]) * share_a, odd_a = in[1] * broadcast(kA) * share_a;
  const Vec even_b = fma(in[2], broadcast(kB2), in[0]) * share_b, odd_b = in[1] * broadcast(kB) * share_b;
  out[0] = in[0] * broadcast(1.0f / (kA2 * kB2));
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
  out[5] = in[2];
}

inline void transform_products(const Vec* in, Vec* out) {
  const Vec sum_a = in[1] + in[2], difference_a = in[1] - in[2];
  const Vec sum_b = in[3] + in[4], difference_b = in[3] - in[4];
  out[0] = in[0] + sum_a + sum_b;
  out[1] = fma(difference_a, broadcast(kA), difference_b * broadcast(kB));
  out[2] = fma(sum_a, broadcast(kA2), sum_b * broadcast(kB2));
  out[3] = fma(difference_a, broadcast(kA3), fma(difference_b, broadcast(kB3), in[5]));
}

// One panel of weight [3, 3, C, K] to [36, C, 32], zero beyond K.
void transform_panel(const Conv3x3Params& p, int64_t panel, float* out) {
  const int64_t first = panel * kConvPanel, matrix = int64_t{p.in_channels} * kConvPanel;
  const int64_t tap_stride = int64_t{p.in_channels} * p.out_channels;
  for (int64_t i = 0; i < matrix; i += kWidth) {
    const int64_t k = first + i % kConvPanel;
    const int count = static_cast<int>(std::clamp<int64_t>(p.out_channels - k, 0, kWidth));
    const float* weight = p.weight + i / kConvPanel * p.out_channels + k;
    Vec rows[3][kConvTaps];
    LPD_UNROLL for (int y = 0; y < 3; ++y) {
      Vec taps[3];
      LPD_UNROLL for (int x = 0; x < 3; ++x) {
        const float* tap = weight + (3 * y + x) * tap_stride;
        taps[x] = count == kWidth ? load(tap) : load_partial(tap, count);
      }
      transform_weights(taps, rows[y]);
    }
    LPD_UNROLL for (int b = 0; b < kConvTaps; ++b) {
      const Vec column[3] = {rows[0][b], rows[1][b], rows[2][b]};
      Vec result[kConvTaps];
      transform_weights(column, result);
      LPD_UNROLL for (int a = 0; a < kConvTaps; ++a) store(out + (a * kConvTaps + b) * matrix + i, result[a]);
    }
  }
}

inline Vec swish(Vec x) {
  // Beyond 87 the result is 0 in fp32, and exp would overflow.
  const Vec exponent = min(broadcast(0.0f) - x, broadcast(87.0f));
  return x / (broadcast(1.0f) + exp_upto_87(exponent));
}

struct Block {
  int64_t first_row;  // of the tile rows of all images
  int rows, first_column, columns;
};

Block make_block(const Conv3x3Params& p, int64_t index) {
  const int64_t down = index / p.plan.blocks_across, across = index % p.plan.blocks_across;
  const int64_t rows = int64_t{p.batch} * p.plan.tile_rows;
  Block block;
  block.first_row = down * p.plan.block_rows;
  block.rows = static_cast<int>(std::clamp<int64_t>(rows - block.first_row, 0, p.plan.block_rows));
  block.first_column = static_cast<int>(across) * p.plan.block_columns;
  block.columns = std::min(p.plan.block_columns, p.plan.tile_columns - block.first_column);
  return block;
}

// One tile row of a block, kWidth channels: columns are transformed once, though neighbouring tiles share two of them.
template <bool Normed>
void transform_strip(const Conv3x3Params& p, int64_t tile_row, int first_column, int columns,
                     int64_t channel, float* points, int64_t point_stride) {
  const int64_t image = tile_row / p.plan.tile_rows;
  const int top = static_cast<int>(tile_row % p.plan.tile_rows) * kConvTile - 1, left = first_column * kConvTile - 1;
  const int shift = p.upsample ? 1 : 0;
  const int64_t row_stride = int64_t{p.width >> shift} * p.in_channels;
  const float* x = p.x + image * (p.height >> shift) * row_stride + channel;
  Vec scale, offset;
  if constexpr (Normed) {
    scale = load(p.scale_shift + image * 2 * p.in_channels + channel);
    offset = load(p.scale_shift + (image * 2 + 1) * p.in_channels + channel);
  }
  Vec strip[kConvMaxColumns * kConvTile + 2][kConvTaps];
  for (int j = 0; j < columns * kConvTile + 2; ++j) {
    Vec pixels[kConvTaps];
    const bool inside = left + j >= 0 && left + j < p.width;
    for (int i = 0; i < kConvTaps; ++i) {
      pixels[i] = broadcast(0.0f);
      if (!inside || top + i < 0 || top + i >= p.height) continue;
      pixels[i] = load(x + ((top + i) >> shift) * row_stride + int64_t{(left + j) >> shift} * p.in_channels);
      if constexpr (Normed) pixels[i] = swish(fma(pixels[i], scale, offset));
    }
    transform_pixels(pixels, strip[j]);
  }
  for (int tile = 0; tile < columns; ++tile) {
    LPD_UNROLL for (int a = 0; a < kConvTaps; ++a) {
      Vec row[kConvTaps], result[kConvTaps];
      LPD_UNROLL for (int b = 0; b < kConvTaps; ++b) row[b] = strip[tile * kConvTile + b][a];
      transform_pixels(row, result);
      float* out = points + tile * (p.in_channels + kConvPad) + channel;
      LPD_UNROLL for (int b = 0; b < kConvTaps; ++b) store(out + (a * kConvTaps + b) * point_stride, result[b]);
    }
  }
}

void transform_block(const Conv3x3Params& p, const Block& block, float* points) {
  const int64_t point_stride = conv3x3_point_floats(p);
  const auto strip = p.scale_shift != nullptr ? transform_strip<true> : transform_strip<false>;
  for (int row = 0; row < block.rows; ++row) {
    float* out = points + int64_t{row} * block.columns * (p.in_channels + kConvPad);
    for (int64_t channel = 0; channel < p.in_channels; channel += kWidth) {
      strip(p, block.first_row + row, block.first_column, block.columns, channel, out, point_stride);
    }
  }
}

// c[Rows, kVecs * kWidth] = a[Rows, depth] b[depth, kVecs * kWidth]; rows of b and c are kConvPanel long.
template <int Rows>
void multiply_block(const float* a, int64_t a_stride, const float* b, int depth, float* c) {
  Vec sum[Rows][kVecs];
  LPD_UNROLL for (int r = 0; r < Rows; ++r) {
    LPD_UNROLL for (int v = 0; v < kVecs; ++v) sum[r][v] = broadcast(0.0f);
  }
  for (int k = 0; k < depth; ++k) {
    Vec right[kVecs];
    LPD_UNROLL for (int v = 0; v < kVecs; ++v) right[v] = load(b + int64_t{k} * kConvPanel + v * kWidth);
    LPD_UNROLL for (int r = 0; r < Rows; ++r) {
      const Vec left = broadcast(a[r * a_stride + k]);
      LPD_UNROLL for (int v = 0; v < kVecs; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
    }
  }
  LPD_UNROLL for (int r = 0; r < Rows; ++r) {
    LPD_UNROLL for (int v = 0; v < kVecs; ++v) store(c + r * kConvPanel + v * kWidth, sum[r][v]);
  }
}

template <int Rows>
void multiply_rows(int rows, const float* a, int64_t a_stride, const float* b, int depth, float* c) {
  if (rows == Rows) return multiply_block<Rows>(a, a_stride, b, depth, c);
  if constexpr (Rows > 1) multiply_rows<Rows - 1>(rows, a, a_stride, b, depth, c);
}

void multiply_panel(const Conv3x3Params& p, int tiles, const float* points,
                    const float* weights, float* products) {
  const int blocks = (tiles + kRows - 1) / kRows, block_rows = (tiles + blocks - 1) / blocks;
  const int64_t a_stride = p.in_channels + kConvPad;
  for (int point = 0; point < kConvPoints; ++point) {
    const float* a = points + point * conv3x3_point_floats(p);
    const float* b = weights + int64_t{point} * p.in_channels * kConvPanel;
    float* c = products + point * conv3x3_product_floats(p);
    for (int column = 0; column < kConvPanel; column += kVecs * kWidth) {
      for (int r = 0; r < tiles; r += block_rows) {
        multiply_rows<kRows>(std::min(block_rows, tiles - r), a + r * a_stride, a_stride, b + column, p.in_channels,
                             c + int64_t{r} * kConvPanel + column);
      }
    }
  }
}

void write_tile(const Conv3x3Params& p, const float* products, int64_t product_stride, int64_t channel, int count,
                float* out, int64_t row_stride, int rows, int columns) {
  Vec half[kConvTaps][kConvTile];
  LPD_UNROLL for (int b = 0; b < kConvTaps; ++b) {
    Vec column[kConvTaps];
    LPD_UNROLL for (int a = 0; a < kConvTaps; ++a) column[a] = load(products + (a * kConvTaps + b) * product_stride);
    transform_products(column, half[b]);
  }
  const Vec bias = count == kWidth ? load(p.bias + channel) : load_partial(p.bias + channel, count);
  LPD_UNROLL for (int i = 0; i < kConvTile; ++i) {
    if (i >= rows) break;
    const Vec row[kConvTaps] = {half[0][i], half[1][i], half[2][i], half[3][i], half[4][i], half[5][i]};
    Vec pixels[kConvTile];
    transform_products(row, pixels);
    for (int j = 0; j < columns; ++j) {
      float* pixel = out + i * row_stride + int64_t{j} * p.out_channels;
      Vec value = pixels[j] + bias;
      if (count == kWidth) {
        store(pixel, p.accumulate ? load(pixel) + value : value);
      } else {
        store_partial(pixel, p.accumulate ? load_partial(pixel, count) + value : value, count);
      }
    }
  }
}

void write_panel(const Conv3x3Params& p, const Block& block, int64_t panel,
                 const float* products) {
  const int64_t row_stride = int64_t{p.width} * p.out_channels, product_stride = conv3x3_product_floats(p);
  const int64_t first = panel * kConvPanel;
  const int channels = static_cast<int>(std::min<int64_t>(kConvPanel, p.out_channels - first));
  for (int row = 0; row < block.rows; ++row) {
    const int64_t image = (block.first_row + row) / p.plan.tile_rows;
    const int top = static_cast<int>((block.first_row + row) % p.plan.tile_rows) * kConvTile;
    for (int column = 0; column < block.columns; ++column) {
      const int left = (block.first_column + column) * kConvTile;
      float* out = p.out + (image * p.height + top) * row_stride + int64_t{left} * p.out_channels + first;
      const float* tile = products + (int64_t{row} * block.columns + column) * kConvPanel;
      for (int c = 0; c < channels; c += kWidth) {
        write_tile(p, tile + c, product_stride, first + c, std::min(kWidth, channels - c), out + c, row_stride,
                   std::min(kConvTile, p.height - top), std::min(kConvTile, p.width - left));
      }
    }
  }
}

}  // namespace

void conv3x3_weights(const Conv3x3Params& p, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    transform_panel(p, panel, p.workspace + panel * conv3x3_panel_floats(p));
  }
}

void conv3x3(const Conv3x3Params& p, int64_t begin, int64_t end) {
  const int64_t blocks = p.plan.blocks(), panel_floats = conv3x3_panel_floats(p);
  for (int64_t worker = begin; worker < end; ++worker) {
    float* points = p.workspace + worker * conv3x3_worker_floats(p) +
                    (p.plan.splits > 0 ? 0 : p.plan.panels * panel_floats);
    float* products = points + kConvPoints * conv3x3_point_floats(p);
    float* own_weights = products + kConvPoints * conv3x3_product_floats(p);

    int64_t first_block = worker * blocks / p.plan.workers, last_block = (worker + 1) * blocks / p.plan.workers;
    int64_t first_panel = 0, last_panel = p.plan.panels;
    if (p.plan.splits > 0) {
      const int64_t split = worker % p.plan.splits;
      first_block = worker / p.plan.splits;
      last_block = first_block + 1;
      first_panel = split * p.plan.panels / p.plan.splits;
      last_panel = (split + 1) * p.plan.panels / p.plan.splits;
    }
    for (int64_t index = first_block; index < last_block; ++index) {
      const Block block = make_block(p, index);
      transform_block(p, block, points);
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const float* weights = p.workspace + panel * panel_floats;
        if (p.plan.splits > 0) {
          transform_panel(p, panel, own_weights);
          weights = own_weights;
        }
        multiply_panel(p, block.rows * block.columns, points, weights, products);
        write_panel(p, block, panel, products);
      }
    }
  }
}

}  // namespace lpd::LPD_ISA
