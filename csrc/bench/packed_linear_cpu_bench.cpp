// fc1 of lpd_l for a step's rows. The layers' weights come in turn, so that they are read from memory as in a decode.
#include <atomic>

#include "cpu_bench.h"

namespace lpd::bench {
namespace {

constexpr int kHidden = 4 * kWidth;
constexpr int64_t kCold = 128 << 20;  // bytes of weights, more than caches hold

struct Data {
  Floats x, weights, y, scale;
  std::vector<uint8_t> bytes;
  std::vector<RowQuantization> quantization;
  std::vector<uint32_t> packed_rows;
  int64_t layers = 0;
};

Work work_of(LinearOperands operands, const Shape& shape, int32_t batch) {
  const int64_t rows = int64_t{2} * batch * (shape.num_context + shape.num_query);
  PackedLinearParams p{};
  p.operands = operands;
  p.planes = 1;
  p.num_rows = rows;
  p.in_features = p.x_stride = kWidth;
  p.out_features = kHidden;
  p.group_panels = p.row_parts = 1;
  p.last_word = static_cast<int32_t>(linear_words(p));
  const int64_t words = linear_words(p), layer_words = words * kHidden;
  auto data = std::make_shared<Data>();
  data->layers = kCold / (4 * layer_words);
  data->weights = random_floats(data->layers * layer_words);
  data->x = random_floats(rows * kWidth);
  data->y = Floats(static_cast<size_t>(rows * kHidden));
  data->scale = random_floats(kHidden);
  data->bytes = std::vector<uint8_t>(static_cast<size_t>(rows * kWidth), 7);
  data->quantization = std::vector<RowQuantization>(static_cast<size_t>(rows), {0.01f, 128.0f});
  data->packed_rows = std::vector<uint32_t>(static_cast<size_t>(linear_scratch_words(p, words)));
  p.x = operands == LinearOperands::kInt8 ? static_cast<const void*>(data->bytes.data()) : data->x.data();
  p.packed_rows = data->packed_rows.data();
  p.quantization = data->quantization.data();
  p.scale = p.column_sum = data->scale.data();
  p.bias = data->scale.data();
  cpu_kernels().pack_linear_rows(p, 0, linear_blocks(p));
  Work work;
  work.items = linear_panels(p);
  // Each thread takes a share of the panels as a layer of its own.
  work.kernel = [p, data, rows, words, layer_words, kernel = cpu_kernels().packed_linear](int64_t begin, int64_t end) {
    thread_local int64_t layer = 0;
    layer = (layer + 1) % data->layers;
    std::atomic<int64_t> next_item{0};
    PackedLinearParams share = p;
    share.weight =
        reinterpret_cast<const uint32_t*>(data->weights.data()) + layer * layer_words + begin * words * kLinearPanel;
    share.out_features = static_cast<int32_t>((end - begin) * kLinearPanel);
    share.y = data->y.data() + begin * kLinearPanel * rows;
    share.next_item = &next_item;
    kernel(share, 0, 1);
  };
  work.flops = 2.0 * static_cast<double>(rows) * kWidth * kHidden;
  return work;
}

}  // namespace

Work packed_linear_work(const Shape& shape, int32_t batch) { return work_of(LinearOperands::kFloat32, shape, batch); }

Work packed_linear_int8_work(const Shape& shape, int32_t batch) { return work_of(LinearOperands::kInt8, shape, batch); }

}  // namespace lpd::bench
