// conv3x3 on the CPU. A worker transforms the pixels of a block of up to 64 tiles, then takes one panel of 32 output
// channels after the other: 36 matrix products, whose results are transformed back while they are in L2. Weights are
// transformed anew in every call, which costs less than reading them from memory four times as large. Limited by FMAs.
//
// The points of F(4x4, 3x3) are 0, +-3/4, +-3/2 and infinity: at the usual 0, +-1, +-2 the rounding error is twice as
// large (2.2e-6 against 1.0e-6 of the result's deviation at C = 128; a direct fp32 convolution: 2e-7).
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/cpu_kernels.h"
#include "common/register_product.h"

namespace lpd::LPD_ISA {
namespace {

constexpr int kWidth = Vec::kWidth;
static_assert(kConvPanel % (kBlockVecs * kWidth) == 0 && kConvPad % kWidth == 0);

// Operands of the matrix products; kRounded is bfloat16 held in fp32, where there are no instructions for it.
enum class Operands { kFloat32, kRounded, kBFloat16 };

template <Operands>
struct Element {
  using Type = float;
  using Word = float;
  using Words = Floats;
};
#if defined(LPD_ISA_AVX512)
template <>
struct Element<Operands::kBFloat16> {
  using Type = BFloat16;
  using Word = uint32_t;
  using Words = NativeBFloat16Words;
};
#endif

inline Vec rounded(Vec a) {
  BFloat16 bits[kWidth];
  store(bits, a);
  return load(bits);
}

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

#if defined(LPD_ISA_AVX512)
// Rounded to bfloat16: out[2 * lane] = even, out[2 * lane + 1] = odd.
inline void store_pairs(BFloat16* out, Vec even, Vec odd) {
  BFloat16 bits[2][kWidth];
  store(bits[0], even);
  store(bits[1], odd);
  const auto wide = [](const BFloat16* b) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  };
  _mm512_storeu_si512(out, _mm512_or_si512(wide(bits[0]), _mm512_slli_epi32(wide(bits[1]), 16)));
}
#endif

// The kWidth weights of input channel c from output channel k on, 0 beyond K, at all points.
void transform_channel(const Conv3x3Params& p, int64_t c, int64_t k, Vec* out) {
  const int64_t tap_stride = int64_t{p.in_channels} * p.out_channels;
  const int count = static_cast<int>(std::clamp<int64_t>(p.out_channels - k, 0, kWidth));
  const float* weight = p.weight + c * p.out_channels + k;
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
    LPD_UNROLL for (int a = 0; a < kConvTaps; ++a) out[a * kConvTaps + b] = result[a];
  }
}

// One panel of weight [3, 3, C, K] to [36, C, 32], or to [36, C / 2, 32, 2] of bfloat16.
template <Operands kind>
void transform_panel(const Conv3x3Params& p, int64_t panel, float* panel_out) {
  auto* out = reinterpret_cast<typename Element<kind>::Type*>(panel_out);
  const int64_t first = panel * kConvPanel, matrix = int64_t{p.in_channels} * kConvPanel;
  Vec values[2][kConvPoints];
  for (int64_t k = 0; k < kConvPanel; k += kWidth) {
    for (int64_t c = 0; c < p.in_channels; c += 2) {
      transform_channel(p, c, first + k, values[0]);
      transform_channel(p, c + 1, first + k, values[1]);
      for (int point = 0; point < kConvPoints; ++point) {
        auto* to = out + point * matrix + c * kConvPanel;
        if constexpr (kind == Operands::kBFloat16) {
          store_pairs(to + 2 * k, values[0][point], values[1][point]);
        } else {
          for (int i = 0; i < 2; ++i) {
            const Vec value = values[i][point];
            store(to + i * kConvPanel + k, kind == Operands::kRounded ? rounded(value) : value);
          }
        }
      }
    }
  }
}

inline Vec swish(Vec x) {
  // Below -87 exp(-x) would overflow, and the result is 0 but for 1e-36. NaN is the second operand, which is kept.
  const Vec least = max(broadcast(-87.0f), x);
  return least / (broadcast(1.0f) + exp_upto_87(broadcast(0.0f) - least));
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
template <Operands kind, bool Normed>
void transform_strip(const Conv3x3Params& p, int64_t tile_row, int first_column, int columns, int64_t channel,
                     typename Element<kind>::Type* points, int64_t point_stride) {
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
      auto* out = points + tile * (p.in_channels + kConvPad) + channel;
      LPD_UNROLL for (int b = 0; b < kConvTaps; ++b) {
        store(out + (a * kConvTaps + b) * point_stride, kind == Operands::kRounded ? rounded(result[b]) : result[b]);
      }
    }
  }
}

template <Operands kind>
void transform_block(const Conv3x3Params& p, const Block& block, typename Element<kind>::Type* points) {
  const int64_t point_stride = conv3x3_point_floats(p);
  const auto strip = p.scale_shift != nullptr ? transform_strip<kind, true> : transform_strip<kind, false>;
  for (int row = 0; row < block.rows; ++row) {
    auto* out = points + int64_t{row} * block.columns * (p.in_channels + kConvPad);
    for (int64_t channel = 0; channel < p.in_channels; channel += kWidth) {
      strip(p, block.first_row + row, block.first_column, block.columns, channel, out, point_stride);
    }
  }
}

// products[tiles, kConvPanel] of a point = its pixels [tiles, C] times its weights [C, kConvPanel].
template <Operands kind>
void multiply_panel(const Conv3x3Params& p, int tiles, const typename Element<kind>::Type* points,
                    const typename Element<kind>::Type* weights, float* products) {
  using Words = typename Element<kind>::Words;
  using Word = typename Element<kind>::Word;
  constexpr int kPerWord = sizeof(Word) / sizeof(*points);  // input channels
  const int depth = p.in_channels / kPerWord;
  FetchNothing nothing;
  for (int point = 0; point < kConvPoints; ++point) {
    const auto* pixels = reinterpret_cast<const Word*>(points + point * conv3x3_point_floats(p));
    const auto* panel = reinterpret_cast<const Word*>(weights) + int64_t{point} * depth * kConvPanel;
    multiply<Words>(tiles, kConvPanel / kWidth, Matrix{pixels, int64_t{p.in_channels + kConvPad} / kPerWord},
                    Matrix{panel, Fixed<kConvPanel>()}, depth,
                    Matrix{products + point * conv3x3_product_floats(p), Fixed<kConvPanel>()}, std::false_type(),
                    nothing);
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

void write_panel(const Conv3x3Params& p, const Block& block, int64_t panel, const float* products) {
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

template <Operands kind>
void shared_weights(const Conv3x3Params& p, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    transform_panel<kind>(p, panel, p.workspace + panel * conv3x3_panel_floats(p));
  }
}

template <Operands kind>
void work(const Conv3x3Params& p, int64_t begin, int64_t end) {
  using T = typename Element<kind>::Type;
  const int64_t blocks = p.plan.blocks(), panel_floats = conv3x3_panel_floats(p);
  for (int64_t worker = begin; worker < end; ++worker) {
    float* own =
        p.workspace + worker * conv3x3_worker_floats(p) + (p.plan.splits > 0 ? 0 : p.plan.panels * panel_floats);
    auto* points = reinterpret_cast<T*>(own);
    float* products = own + kConvPoints * conv3x3_point_floats(p);
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
      transform_block<kind>(p, block, points);
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const float* weights = p.workspace + panel * panel_floats;
        if (p.plan.splits > 0) {
          transform_panel<kind>(p, panel, own_weights);
          weights = own_weights;
        }
        multiply_panel<kind>(p, block.rows * block.columns, points, reinterpret_cast<const T*>(weights), products);
        write_panel(p, block, panel, products);
      }
    }
  }
}

template <class Function>
void for_operands(const Conv3x3Params& p, Function&& function) {
  if (!p.bfloat16) return function(std::integral_constant<Operands, Operands::kFloat32>());
#if defined(LPD_ISA_AVX512)
  if (cpu_has_bfloat16()) return function(std::integral_constant<Operands, Operands::kBFloat16>());
#endif
  function(std::integral_constant<Operands, Operands::kRounded>());
}

}  // namespace

void conv3x3_weights(const Conv3x3Params& p, int64_t begin, int64_t end) {
  for_operands(p, [&](auto kind) { shared_weights<decltype(kind)::value>(p, begin, end); });
}

void conv3x3(const Conv3x3Params& p, int64_t begin, int64_t end) {
  for_operands(p, [&](auto kind) { work<decltype(kind)::value>(p, begin, end); });
}

}  // namespace lpd::LPD_ISA
