// preview_pixels: a small network from tokens to pixels. The unit vectors of the tokens and a channel that says which
// cells are drawn go through two 3x3 convolutions with ReLU and, cell by cell, a product that gives the cell's pixels.
// CPU only.
#pragma once

#include <cstdint>

namespace lpd {

// All arrays contiguous.
struct PreviewPixelsParams {
  const int64_t* tokens;   // [B, h, w], in [-1, V); -1: not drawn, zeros to the network, grey pixels
  const float* codebook;   // [V, d], of any length
  const float* weight1;    // [3, 3, d + 1, K]
  const float* bias1;      // [K]
  const float* weight2;    // [3, 3, K, L]
  const float* bias2;      // [L]
  const float* head;       // [L, s, s, 3]
  const float* head_bias;  // [s, s, 3]
  uint8_t* pixels;         // [B, h s, w s, 3]: round(clip((x + 1) * 127.5, 0, 255))
  float* workspace;        // [B, preview_workspace_floats]
  int64_t batch;
  int32_t height, width;   // h, w
  int32_t code_length;     // d
  int32_t width1, width2;  // K, L
  int32_t stride;          // s
};

namespace {  // internal linkage: units built for different instruction sets must not share code

// Of an image: the inputs of the convolutions with a cell of zeros around, those of the head, and a row of its results.
inline int64_t preview_workspace_floats(const PreviewPixelsParams& p) {
  const int64_t height = p.height, row = p.width, channels = p.code_length + 1;
  return (height + 2) * (row + 2) * (channels + p.width1) + row * p.width2 + row * 3 * p.stride * p.stride;
}

}  // namespace
}  // namespace lpd
