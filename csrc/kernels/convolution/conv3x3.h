// conv3x3: 3x3 convolution, stride 1, one zero pixel around, by Winograd's F(4x4, 3x3): 36 products where a direct
// convolution takes 144. On the way in: GroupNorm and swish, or nearest x2; on the way out: bias, and adding to what is
// there. CPU only.
#pragma once

#include <algorithm>
#include <cstdint>

namespace lpd {

constexpr int kConvTile = 4;         // pixels of the output per side of a tile
constexpr int kConvTaps = 6;         // pixels of the input per side of a tile
constexpr int kConvPoints = 36;      // kConvTaps squared: transformed values of a tile, each a product of matrices
constexpr int kConvPanel = 32;       // output channels that are computed together
constexpr int kConvMaxColumns = 16;  // tiles of a block side by side
constexpr int kConvMaxTiles = 64;    // tiles of a block: enough that transformed weights are read seldom
constexpr int kConvPad = 16;         // floats that keep rows and matrices off the same sets of L1

// Division of the work. Tile rows are numbered through all images, so that small images share a block; a block is
// `rows` tile rows by `columns` tiles.
struct Conv3x3Plan {
  int32_t tile_rows, tile_columns;  // of one image
  int32_t block_rows, block_columns;
  int64_t blocks_down, blocks_across;
  int32_t panels;
  int32_t splits;   // workers that share one block, by panels; 0: each worker has whole blocks, weights are shared
  int32_t workers;  // the items of the kernel, each with its own part of the workspace

  int64_t blocks() const { return blocks_down * blocks_across; }
};

// All arrays contiguous; H and W are those of the output.
struct Conv3x3Params {
  const float* x;            // [B, H, W, C], or [B, H / 2, W / 2, C] with upsample
  const float* weight;       // [3, 3, C, K]
  const float* bias;         // [K]
  const float* scale_shift;  // [B, 2, C]: swish(x * scale + shift) is convolved; nullptr: x
  float* out;                // [B, H, W, K]
  float* workspace;          // conv3x3_workspace_floats of them
  int32_t batch;
  int32_t height;
  int32_t width;
  int32_t in_channels;   // C, a multiple of 16
  int32_t out_channels;  // K
  bool upsample;
  bool accumulate;  // add to out
  bool bfloat16;    // round the operands of the matrix products to bfloat16; sums stay fp32
  Conv3x3Plan plan;
};

namespace {  // internal linkage: units built for different instruction sets must not share code

inline Conv3x3Plan conv3x3_plan(int64_t batch, int64_t height, int64_t width, int64_t out_channels, int64_t threads) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t tile_rows = divide_up(height, kConvTile), tile_columns = divide_up(width, kConvTile);
  const int64_t panels = divide_up(out_channels, kConvPanel), rows = batch * tile_rows;
  Conv3x3Plan plan{};
  plan.tile_rows = static_cast<int32_t>(tile_rows);
  plan.tile_columns = static_cast<int32_t>(tile_columns);
  plan.panels = static_cast<int32_t>(panels);
  if (rows * tile_columns * panels == 0) return plan;
  plan.blocks_across = divide_up(tile_columns, kConvMaxColumns);
  plan.block_columns = static_cast<int32_t>(divide_up(tile_columns, plan.blocks_across));
  plan.blocks_down = divide_up(rows, kConvMaxTiles / plan.block_columns);
  plan.block_rows = static_cast<int32_t>(divide_up(rows, plan.blocks_down));
  const int64_t blocks = plan.blocks();
  plan.splits = static_cast<int32_t>(blocks > threads ? 0 : std::min(panels, threads / blocks));
  plan.workers = static_cast<int32_t>(blocks > threads ? threads : blocks * plan.splits);
  return plan;
}

// Floats of one panel's transformed weights, of a block's transformed pixels, and of its products with one panel.
inline int64_t conv3x3_panel_floats(const Conv3x3Params& p) {
  return int64_t{kConvPoints} * p.in_channels * kConvPanel;
}
inline int64_t conv3x3_point_floats(const Conv3x3Params& p) {
  return int64_t{p.plan.block_rows} * p.plan.block_columns * (p.in_channels + kConvPad) + kConvPad;
}
inline int64_t conv3x3_product_floats(const Conv3x3Params& p) {
  return int64_t{p.plan.block_rows} * p.plan.block_columns * kConvPanel + kConvPad;
}
inline int64_t conv3x3_worker_floats(const Conv3x3Params& p) {
  return kConvPoints * (conv3x3_point_floats(p) + conv3x3_product_floats(p)) +
         (p.plan.splits > 0 ? conv3x3_panel_floats(p) : 0);
}
inline int64_t conv3x3_workspace_floats(const Conv3x3Params& p) {
  return p.plan.workers * conv3x3_worker_floats(p) + (p.plan.splits > 0 ? 0 : p.plan.panels * conv3x3_panel_floats(p));
}

}  // namespace
}  // namespace lpd
