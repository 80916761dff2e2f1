// group_norm_scale_shift on the CPU: group_norm_partials reads each pixel once from memory and leaves mean and centred
// squares of every chunk and channel; group_norm_scale_shift merges them per group in double precision. One item is one
// chunk of one image, then one group of one image; results do not depend on the threads. Limited by bandwidth: 4 C
// bytes a pixel.
#include <algorithm>
#include <cmath>

#include "common/cpu_kernels.h"
#include "common/simd.h"

namespace lpd::LPD_ISA {
namespace {

constexpr int kWidth = Vec::kWidth;

// Channel vectors that are summed side by side: one at a time would wait for the adder.
constexpr int kSide = 4;

template <int Vecs>
void chunk_moments(const float* x, int64_t pixels, int64_t channels, float* mean, float* squares) {
  Vec sum[Vecs], centre[Vecs], square[Vecs], rest[Vecs];
  for (int v = 0; v < Vecs; ++v) sum[v] = square[v] = rest[v] = broadcast(0.0f);
  for (int64_t i = 0; i < pixels; ++i) {
    LPD_UNROLL for (int v = 0; v < Vecs; ++v) sum[v] = sum[v] + load(x + i * channels + v * kWidth);
  }
  const Vec share = broadcast(1.0f / static_cast<float>(pixels));
  for (int v = 0; v < Vecs; ++v) centre[v] = sum[v] * share;
  for (int64_t i = 0; i < pixels; ++i) {
    LPD_UNROLL for (int v = 0; v < Vecs; ++v) {
      const Vec centred = load(x + i * channels + v * kWidth) - centre[v];
      square[v] = fma(centred, centred, square[v]);
      rest[v] = rest[v] + centred;
    }
  }
  for (int v = 0; v < Vecs; ++v) {
    // The rounding error of the mean would dominate where values lie far from 0.
    const Vec left = rest[v] * share;
    store(mean + v * kWidth, centre[v] + left);
    store(squares + v * kWidth, square[v] - left * rest[v]);
  }
}

}  // namespace

void group_norm_partials(const GroupNormParams& p, int64_t begin, int64_t end) {
  const int64_t chunks = group_norm_chunks(p), channels = p.channels;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item % chunks * kGroupNormChunk, pixels = std::min(kGroupNormChunk, p.pixels - first);
    const float* x = p.x + (item / chunks * p.pixels + first) * channels;
    float* mean = p.partials + item * 2 * channels;
    float* squares = mean + channels;
    int64_t c = 0;
    for (; c + kSide * kWidth <= channels; c += kSide * kWidth) {
      chunk_moments<kSide>(x + c, pixels, channels, mean + c, squares + c);
    }
    for (; c + kWidth <= channels; c += kWidth) chunk_moments<1>(x + c, pixels, channels, mean + c, squares + c);
    for (; c < channels; ++c) {
      double sum = 0, square = 0;
      for (int64_t i = 0; i < pixels; ++i) sum += x[i * channels + c];
      const double centre = sum / static_cast<double>(pixels);
      for (int64_t i = 0; i < pixels; ++i) square += (x[i * channels + c] - centre) * (x[i * channels + c] - centre);
      mean[c] = static_cast<float>(centre);
      squares[c] = static_cast<float>(square);
    }
  }
}

void group_norm_scale_shift(const GroupNormParams& p, int64_t begin, int64_t end) {
  const int64_t chunks = group_norm_chunks(p), channels = p.channels, size = channels / p.groups;
  const int64_t last = p.pixels - (chunks - 1) * kGroupNormChunk;  // pixels of the last chunk
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.groups, first = item % p.groups * size;
    const float* partials = p.partials + image * chunks * 2 * channels + first;
    const auto merge = [&](auto&& of_chunk) {
      double total = 0;
      for (int64_t k = 0; k < chunks; ++k) {
        const double pixels = static_cast<double>(k + 1 < chunks ? kGroupNormChunk : last);
        const float* mean = partials + k * 2 * channels;
        for (int64_t c = 0; c < size; ++c) total += of_chunk(pixels, double{mean[c]}, double{mean[channels + c]});
      }
      return total / (static_cast<double>(size) * static_cast<double>(p.pixels));
    };
    const double mean = merge([](double pixels, double chunk_mean, double) { return pixels * chunk_mean; });
    const double variance = merge([&](double pixels, double chunk_mean, double squares) {
      return squares + pixels * (chunk_mean - mean) * (chunk_mean - mean);
    });
    // 0 * inf: where squares overflow a group becomes NaN, as torch's does.
    const double inverse_deviation = 1.0 / std::sqrt(variance + double{p.eps}) + 0.0 * variance;
    float* scale = p.scale_shift + image * 2 * channels + first;
    for (int64_t c = 0; c < size; ++c) {
      const double factor = p.weight[first + c] * inverse_deviation;
      scale[c] = static_cast<float>(factor);
      scale[channels + c] = static_cast<float>(p.bias[first + c] - mean * factor);
    }
  }
}

}  // namespace lpd::LPD_ISA
