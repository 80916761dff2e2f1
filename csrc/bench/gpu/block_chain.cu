// The blocks of lpd_l one after the other in one step, by our products of few rows: how much of a block is launches
// waiting for each other. Each block has weights of its own, which come from memory.
#include "../operator_params.h"
#include "recorded_launches.h"

namespace lpd::bench {
namespace {

struct Sizes {
  int32_t blocks, heads, head_dim, sequences;
  SequenceSizes step;
  int32_t width() const { return heads * head_dim; }
  int32_t rows() const { return sequences * (step.num_context + step.num_query); }
};

// One block's weights [N, K], small and all alike: times do not depend on values.
struct Weights {
  explicit Weights(int64_t width)
      : qkv(3 * width * width, 0x3a00),
        proj(width * width, 0x3a00),
        fc1(4 * width * width, 0x3a00),
        fc2(4 * width * width, 0x3a00) {}
  DeviceArray<uint16_t> qkv, proj, fc1, fc2;
};

class Chain {
 public:
  explicit Chain(const Sizes& sizes)
      : sizes_(sizes),
        x_(elements(1)),
        statistics_(elements(1) / 16),
        slope_(int64_t{4} * sizes.width()),
        shift_(int64_t{4} * sizes.width()),
        scaled_(elements(1), 0x3f80),
        qkv_(elements(3)),
        attended_(elements(1)),
        hidden_(elements(4)),
        ones_(sizes.width(), 0x3f80),
        k_cache_(cache_elements()),
        v_cache_(cache_elements()),
        workspace_(group_attention_workspace_bytes(sizes.head_dim, kEmulated ? 132 : multiprocessor_count())),
        segments_(sizes.sequences) {
    for (int i = 0; i < sizes.blocks; ++i) weights_.push_back(std::make_unique<Weights>(sizes.width()));
    const auto segments = make_segments(std::vector<SequenceSizes>(static_cast<size_t>(sizes.sequences), sizes.step));
    copy_segments(segments);
  }

  void launch_all(void* stream) {
    for (const auto& weights : weights_) {
      normed(scaled_.data(), weights->qkv.data(), 3 * sizes_.width(), false, qkv_.data(), stream);
      attend(stream);
      residual(attended_.data(), weights->proj.data(), sizes_.width(), stream);
      normed(scaled_.data(), weights->fc1.data(), 4 * sizes_.width(), true, hidden_.data(), stream);
      residual(hidden_.data(), weights->fc2.data(), 4 * sizes_.width(), stream);
    }
  }

 private:
  int64_t elements(int64_t times_width) const { return times_width * sizes_.rows() * sizes_.width(); }
  int32_t positions() const { return sizes_.step.cache_length + sizes_.step.num_context; }
  int64_t cache_elements() const { return int64_t{sizes_.sequences} * positions() * sizes_.width(); }

  void copy_segments(const std::vector<Segment>& segments) {
    const size_t bytes = segments.size() * sizeof(Segment);
#ifdef LPD_CUDA_EMULATED
    std::memcpy(segments_.data(), segments.data(), bytes);
#else
    check(cudaMemcpy(segments_.data(), segments.data(), bytes, cudaMemcpyHostToDevice));
#endif
  }

  FewRowProduct product(const void* rows, const void* weight, int32_t features, int32_t depth) const {
    return {rows, weight, depth, depth, sizes_.rows(), features, depth, DType::kBFloat16};
  }

  void normed(const void* rows, const void* weight, int32_t features, bool gelu, void* output, void* stream) {
    NormedLinearParams p{};
    static_cast<FewRowProduct&>(p) = product(rows, weight, features, sizes_.width());
    p.statistics = statistics_.data();
    p.slope = slope_.data();
    p.shift = shift_.data();
    p.output = output;
    p.eps = 1e-6f;
    p.gelu = gelu;
    launch_normed_linear(p, stream);
  }

  void residual(const void* rows, const void* weight, int32_t depth, void* stream) {
    ResidualLinearParams p{};
    static_cast<FewRowProduct&>(p) = product(rows, weight, sizes_.width(), depth);
    p.x = x_.data();
    p.scale = ones_.data();
    p.scaled = scaled_.data();
    p.statistics = statistics_.data();
    p.x_stride = sizes_.width();
    launch_residual_linear(p, stream);
  }

  void attend(void* stream) {
    struct {
      Pointer<uint16_t> qkv;
      Pointer<Segment> segments;
    } arrays{{qkv_.data()}, {segments_.data()}};
    const int32_t most_rows = sizes_.step.num_context + sizes_.step.num_query;
    GroupAttentionParams p = group_attention_params(
        cache_rows(arrays, {sizes_.sequences, sizes_.heads, sizes_.head_dim, positions()}, most_rows, DType::kBFloat16),
        sizes_.step.cache_length + most_rows, 0.125f);
    p.settled = true;
    p.k_cache = k_cache_.data();
    p.v_cache = v_cache_.data();
    p.output = attended_.data();
    p.workspace = workspace_.data();
    p.workspace_bytes = group_attention_workspace_bytes(sizes_.head_dim, kEmulated ? 132 : multiprocessor_count());
    launch_group_attention(p, stream);
  }

  template <class T>
  struct Pointer {
    T* pointer;
    T* data() const { return pointer; }
  };

  Sizes sizes_;
  std::vector<std::unique_ptr<Weights>> weights_;
  DeviceArray<float> x_, statistics_, slope_, shift_;
  DeviceArray<uint16_t> scaled_, qkv_, attended_, hidden_, ones_, k_cache_, v_cache_;
  DeviceArray<uint8_t> workspace_;
  DeviceArray<Segment> segments_;
};

}  // namespace

void measure_block_chain() {
  // Of L-256-20: the first image's steps, its middle ones, and the last; with guidance.
  const SequenceSizes steps[] = {{1, 2, 1}, {11, 12, 38}, {20, 20, 217}};
  for (const SequenceSizes& step : steps) {
    const Sizes sizes = kEmulated ? Sizes{2, 2, 64, 2, step} : Sizes{24, 16, 64, 2, step};
    if (kEmulated && step.num_context > 1) continue;
    Chain chain(sizes);
    const std::string name = "block of " + std::to_string(sizes.rows()) + " rows";
    const auto all = [&](void* stream) { chain.launch_all(stream); };
    print(name.c_str(), 1e6 * seconds_of(all) / sizes.blocks, "us");
    print((name + ", made to wait").c_str(), 1e6 * seconds_of(all, Overlap::kForbidden) / sizes.blocks, "us");
  }
}

}  // namespace lpd::bench
