// training_attention on the CPU: softmax(scale * q k^T) v with an online softmax, and its gradient from the saved log
// of the sums. One item is one worker, which takes every workers-th head of all images. A head's K and V are packed and
// transposed once; tiles of rows in the order of the steps then walk over spans of keys, and each block of a product
// ends at the last key that one of its rows sees. Limited by FMAs: 4 D per pair of a row and a key that it sees, and
// 10 D for the gradient.
#include <cmath>

#include "common/cpu_kernels.h"
#include "common/softmax_row.h"
#include "training_attention/tile_product.h"

namespace lpd::LPD_ISA {
namespace {

constexpr int kWidth = Vec::kWidth;
constexpr int64_t kTileFloats = int64_t{kTrainingTileRows} * kTrainingTileStride;
static_assert(kTrainingAttentionMaxHeadDim <= kTrainingTileStride && kTileKeys <= kTrainingTileStride);
static_assert(kTrainingAlignment % kWidth == 0);

enum Part { kQ, kK, kV };

// Hands out the parts of a worker's workspace.
class Workspace {
 public:
  explicit Workspace(float* begin) : next_(begin) {}
  float* take(int64_t floats) {
    float* taken = next_;
    next_ += floats;
    return taken;
  }

 private:
  float* next_;
};

template <class T>
void write_row(const float* from, float scale, int n, T* to) {
  const int full = n / kWidth * kWidth;
  const Vec factor = broadcast(scale);
  for (int i = 0; i < full; i += kWidth) store(to + i, load(from + i) * factor);
  if (full < n) store_partial(to + full, load(from + full) * factor, n - full);
}

void fill(float* to, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// One image and head.
template <class T>
struct Head {
  const T* qkv;  // row 0, q
  T* output;     // row 0, as grad_output
  const T* grad_output;
  float* logsumexp;  // [rows]
  T* grad_qkv;
  int64_t row_stride, part_stride, output_stride, grad_part_stride;
  int64_t matrix_stride, key_stride;  // of packed rows, and of transposed ones
  int rows, head_dim;
  float scale;

  Head(const TrainingAttentionParams& p, int64_t index) {
    const int64_t image = index / p.num_heads, head = index % p.num_heads;
    output_stride = grad_part_stride = int64_t{p.num_heads} * p.head_dim;
    const int64_t out = image * p.rows * output_stride + head * p.head_dim;
    qkv = static_cast<const T*>(p.qkv) + image * p.qkv_image_stride + head * p.qkv_head_stride;
    output = static_cast<T*>(p.output) + out;
    logsumexp = p.logsumexp + index * p.rows;
    const bool backward = p.grad_qkv != nullptr;
    grad_output = backward ? static_cast<const T*>(p.grad_output) + out : nullptr;
    grad_qkv = backward ? static_cast<T*>(p.grad_qkv) + 3 * (out - head * p.head_dim) + head * p.head_dim : nullptr;
    row_stride = p.qkv_row_stride;
    part_stride = p.qkv_part_stride;
    matrix_stride = training_attention_padded(p.head_dim);
    key_stride = training_attention_key_stride(p.rows);
    rows = p.rows;
    head_dim = p.head_dim;
    scale = p.scale;
  }

  const T* row_of(Part part, int64_t row) const { return qkv + part * part_stride + row * row_stride; }
  T* grad_row_of(Part part, int64_t row) const { return grad_qkv + (3 * row + part) * grad_part_stride; }

  // to[rows, D], with zeros up to whole cache lines of rows.
  void pack(Part part, float* to) const {
    for (int64_t r = 0; r < rows; ++r) copy_row(row_of(part, r), 1.0f, head_dim, to + r * matrix_stride);
    const int64_t padded = training_attention_padded(rows);
    fill(to + rows * matrix_stride, (padded - rows) * matrix_stride, 0.0f);
  }

  // to[D, rows], with zeros after the last row.
  void pack_transposed(Part part, float* scratch, float* to) const {
    const int64_t padded = training_attention_padded(rows);
    for (int64_t first = 0; first < padded; first += kWidth) {
      for (int64_t r = first; r < first + kWidth; ++r) {
        float* row = scratch + (r - first) * kTileStride;
        if (r < rows) {
          copy_row(row_of(part, r), 1.0f, head_dim, row);
        } else {
          fill(row, head_dim, 0.0f);
        }
      }
      for (int d = 0; d < head_dim; d += 4) {
        transpose4(scratch + d, kTileStride, to + d * key_stride + first, key_stride);
      }
    }
    for (int d = 0; d < head_dim; ++d) fill(to + d * key_stride + padded, key_stride - padded, 0.0f);
  }
};

// Zeros after the first `count` columns, which fill whole vectors, up to those that a block of rows may read.
void clear_unseen(float* row, int count, int num_keys) {
  for (int i = vectors(count) * kWidth; i < num_keys; i += kWidth) store(row + i, broadcast(0.0f));
}

struct ForwardTile {
  RowTile tile;
  float *q, *scores, *sums;
  float row_max[kTrainingTileRows], row_sum[kTrainingTileRows];
};

// Scores into probabilities, unnormalised, against the largest score of a row so far.
void update_softmax(const KeySpan& span, int head_dim, ForwardTile& t) {
  // Two passes: many rows' maxima run at once, where one row's maximum and exponentials would wait for each other.
  float span_max[kTrainingTileRows];
  for (int r = span.begin; r < span.end; ++r) {
    span_max[r] = finish_scores(t.scores + r * kTileStride, span.count[r]);
  }
  for (int r = span.begin; r < span.end; ++r) {
    float* scores = t.scores + r * kTileStride;
    const float row_max = t.row_max[r] > span_max[r] ? t.row_max[r] : span_max[r];
    const float reference = softmax_reference(row_max);
    const float span_sum = exponentiate(scores, span.count[r], reference);
    clear_unseen(scores, span.count[r], span.num_keys);
    if (t.row_max[r] == row_max) {
      t.row_sum[r] += span_sum;
    } else {
      const Vec rescale = exp_nonpositive(broadcast(t.row_max[r] - reference));
      t.row_sum[r] = t.row_sum[r] * reduce_max(rescale) + span_sum;
      float* sums = t.sums + r * kTileStride;
      for (int d = 0; d < head_dim; d += kWidth) store(sums + d, load(sums + d) * rescale);
    }
    t.row_max[r] = row_max;
  }
}

template <class T>
void attend_head(const TrainingAttentionParams& p, const Head<T>& head, Workspace workspace) {
  float* keys = workspace.take(head.key_stride * head.head_dim);
  float* values = workspace.take(training_attention_padded(head.rows) * head.matrix_stride);
  ForwardTile t;
  for (float** part : {&t.q, &t.scores, &t.sums}) *part = workspace.take(kTileFloats);
  head.pack_transposed(kK, t.scores, keys);
  head.pack(kV, values);

  RowTiles tiles(p);
  while (tiles.next(t.tile)) {
    for (int r = 0; r < t.tile.rows; ++r) {
      copy_row(head.row_of(kQ, t.tile.row[r]), head.scale, head.head_dim, t.q + r * kTileStride);
      fill(t.sums + r * kTileStride, head.matrix_stride, 0.0f);
      t.row_max[r] = kMinusInfinity;
      t.row_sum[r] = 0.0f;
    }
    for_each_span(t.tile, [&](const KeySpan& span) {
      score_span(span, head.head_dim, t.q, keys, head.key_stride, t.scores);
      update_softmax(span, head.head_dim, t);
      add_rows(span, head.head_dim, t.scores, values, head.matrix_stride, t.sums);
    });
    for (int r = 0; r < t.tile.rows; ++r) {
      const int64_t row = t.tile.row[r];
      write_row(t.sums + r * kTileStride, 1.0f / t.row_sum[r], head.head_dim, head.output + row * head.output_stride);
      head.logsumexp[row] = t.row_max[r] + std::log(t.row_sum[r]);
    }
  }
}

struct BackwardTile {
  RowTile tile;
  float *q, *grad_output, *probabilities, *grad_scores, *grad_q;
  float logsumexp[kTrainingTileRows];
  float output_dot_grad[kTrainingTileRows];
};

template <class T>
float dot(const T* x, const T* y, int n) {
  Vec sum = broadcast(0.0f);
  const int full = n / kWidth * kWidth;
  for (int i = 0; i < full; i += kWidth) sum = fma(load(x + i), load(y + i), sum);
  if (full < n) sum = fma(load_partial(x + full, n - full), load_partial(y + full, n - full), sum);
  return reduce_add(sum);
}

// Scores into probabilities, and the gradient of probabilities into that of scores.
void differentiate_softmax(const KeySpan& span, BackwardTile& t) {
  for (int r = span.begin; r < span.end; ++r) {
    float* probabilities = t.probabilities + r * kTileStride;
    float* grads = t.grad_scores + r * kTileStride;
    const int count = span.count[r], full = count / kWidth * kWidth;
    const Vec logsumexp = broadcast(t.logsumexp[r]), subtracted = broadcast(t.output_dot_grad[r]);
    for (int i = 0; i < full; i += kWidth) {
      const Vec probability = exp_nonpositive(load(probabilities + i) - logsumexp);
      store(probabilities + i, probability);
      store(grads + i, probability * (load(grads + i) - subtracted));
    }
    if (full < count) {
      const Vec probability = exp_nonpositive(load(probabilities + full) - logsumexp);
      store(probabilities + full, keep_first(probability, count - full, 0.0f));
      store(grads + full, keep_first(probability * (load(grads + full) - subtracted), count - full, 0.0f));
    }
    clear_unseen(probabilities, count, span.num_keys);
    clear_unseen(grads, count, span.num_keys);
  }
}

template <class T>
void differentiate_head(const TrainingAttentionParams& p, const Head<T>& head, Workspace workspace) {
  const int64_t matrix = training_attention_padded(head.rows) * head.matrix_stride;
  float* key_columns = workspace.take(head.key_stride * head.head_dim);
  float* value_columns = workspace.take(head.key_stride * head.head_dim);
  float* keys = workspace.take(matrix);
  float* grad_k = workspace.take(matrix);
  float* grad_v = workspace.take(matrix);
  BackwardTile t;
  for (float** part : {&t.q, &t.grad_output, &t.probabilities, &t.grad_scores, &t.grad_q}) {
    *part = workspace.take(kTileFloats);
  }
  head.pack_transposed(kK, t.probabilities, key_columns);
  head.pack_transposed(kV, t.probabilities, value_columns);
  head.pack(kK, keys);
  fill(grad_k, matrix, 0.0f);
  fill(grad_v, matrix, 0.0f);

  RowTiles tiles(p);
  while (tiles.next(t.tile)) {
    for (int r = 0; r < t.tile.rows; ++r) {
      const int64_t row = t.tile.row[r];
      const T* grad_output = head.grad_output + row * head.output_stride;
      copy_row(head.row_of(kQ, row), head.scale, head.head_dim, t.q + r * kTileStride);
      copy_row(grad_output, 1.0f, head.head_dim, t.grad_output + r * kTileStride);
      fill(t.grad_q + r * kTileStride, head.matrix_stride, 0.0f);
      t.logsumexp[r] = head.logsumexp[row];
      t.output_dot_grad[r] = dot(head.output + row * head.output_stride, grad_output, head.head_dim);
    }
    for_each_span(t.tile, [&](const KeySpan& span) {
      score_span(span, head.head_dim, t.q, key_columns, head.key_stride, t.probabilities);
      score_span(span, head.head_dim, t.grad_output, value_columns, head.key_stride, t.grad_scores);
      differentiate_softmax(span, t);
      add_to_keys(span, head.head_dim, t.probabilities, t.grad_output, grad_v, head.matrix_stride);
      add_to_keys(span, head.head_dim, t.grad_scores, t.q, grad_k, head.matrix_stride);
      add_rows(span, head.head_dim, t.grad_scores, keys, head.matrix_stride, t.grad_q);
    });
    for (int r = 0; r < t.tile.rows; ++r) {
      write_row(t.grad_q + r * kTileStride, head.scale, head.head_dim, head.grad_row_of(kQ, t.tile.row[r]));
    }
  }
  for (int64_t r = 0; r < head.rows; ++r) {
    write_row(grad_k + r * head.matrix_stride, 1.0f, head.head_dim, head.grad_row_of(kK, r));
    write_row(grad_v + r * head.matrix_stride, 1.0f, head.head_dim, head.grad_row_of(kV, r));
  }
}

template <class T>
void run_items(const TrainingAttentionParams& p, int64_t begin, int64_t end) {
  const int64_t heads = int64_t{p.batch} * p.num_heads;
  for (int64_t worker = begin; worker < end; ++worker) {
    const Workspace workspace(p.workspace + worker * p.workspace_stride);
    for (int64_t index = worker; index < heads; index += p.workers) {
      const Head<T> head(p, index);
      if (p.grad_qkv == nullptr) {
        attend_head(p, head, workspace);
      } else {
        differentiate_head(p, head, workspace);
      }
    }
  }
}

}  // namespace

void training_attention(const TrainingAttentionParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto element) { run_items<decltype(element)>(p, begin, end); });
}

}  // namespace lpd::LPD_ISA
