// packed_linear on the CPU. Up to twelve rows, packed so that a word of each lies beside that of the next row, go over
// a panel of 32 channels with all sums in registers (AVX-512; with fewer registers in parts, and in passes over so few
// words that L1 holds them for the next rows); while the rows of one panel are worked off, the next one is fetched from
// memory. Limited by memory for few rows (weights are read once), by multiplications from about 20 rows on.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/cpu_kernels.h"
#include "common/gelu.h"
#include "common/register_product.h"

namespace lpd::LPD_ISA {
namespace {

constexpr int kWidth = Vec::kWidth;
static_assert(kLinearPanel % (kBlockVecs * kWidth) == 0);

// kBlocks blocks of rows go over kWords words of a panel before the next words are taken: either a block at a time over
// all words, with the sums in registers to the end, or several over what L1 holds beside a block, with the sums in L1
// from pass to pass. Sums of floats are added up in the same order either way.
template <class Words>
struct Pass {
  static constexpr int kWords = INT32_MAX, kBlocks = 1, kSteps = 1;  // steps of the product for a word
  struct Accumulate : std::false_type {
    explicit constexpr Accumulate(bool) {}
  };
};

#if defined(LPD_ISA_AVX2)
template <>
struct Pass<FloatWords> {
  static constexpr int kWords = 128, kBlocks = 8, kSteps = 1;
  using Accumulate = bool;
};

template <>
struct Pass<ByteWords> {
  static constexpr int kWords = 64, kBlocks = 8, kSteps = 2;
  using Accumulate = bool;
};
#endif

// Words of packed_rows per word: the word itself, or its even and its odd bytes as pairs of 16 bits.
int row_words(const PackedLinearParams& p) { return p.operands == LinearOperands::kInt8 ? Pass<ByteWords>::kSteps : 1; }

// Rows [first, first + count) of x: `rows` of them in the block, those of the second plane behind those of the first.
struct RowBlock {
  RowBlock(const PackedLinearParams& p, int64_t block) {
    const int64_t block_rows = linear_block_rows(p);
    first = block * block_rows;
    count = static_cast<int>(std::min(block_rows, p.num_rows - first));
    rows = count * p.planes;
    packed = p.packed_rows + first * p.planes * (p.last_word - p.first_word) * row_words(p);
  }
  int64_t first;
  int count, rows;
  uint32_t* packed;
};

const uint32_t* linear_panel(const PackedLinearParams& p, int64_t panel, int word) {
  return p.weight + (panel * linear_words(p) + word) * kLinearPanel;
}

// Words [first, end) of rows and panels.
struct WordRun {
  int first, end;
};

// The words of a panel that a pass goes over: in place, or split into the words that the product takes.
template <class Words>
class PassColumns {
 public:
  const uint32_t* of(const uint32_t* weight, int /*words*/) { return weight; }
};

#if defined(LPD_ISA_AVX2)
template <>
class PassColumns<ByteWords> {
 public:
  const uint32_t* of(const uint32_t* weight, int words) {
    for (int i = 0; i < words; ++i) {
      uint32_t* const even = split_ + 2 * i * kLinearPanel;
      LPD_UNROLL for (int c = 0; c < kLinearPanel; c += kWidth) {
        split_bytes(weight + i * kLinearPanel + c, even + c, even + kLinearPanel + c);
      }
    }
    return split_;
  }

 private:
  alignas(kCacheLine) uint32_t split_[2 * Pass<ByteWords>::kWords * kLinearPanel];
};
#endif

// Number of blocks in which multiply_panel computes the product of some rows.
int product_blocks(int rows) { return (rows + kBlockRows - 1) / kBlockRows * (kLinearPanel / (kBlockVecs * kWidth)); }

// products[block.rows, kLinearPanel] = `steps` words of the block's rows, at `packed`, times those of `columns`, added
// to what is there if `accumulate`.
template <class Words>
void multiply_panel(const RowBlock& block, const uint32_t* packed, const uint32_t* columns, int steps,
                    typename Pass<Words>::Accumulate accumulate, FetchPairs& ahead, float* products) {
  const Matrix rows{packed, Fixed<1>(), int64_t{block.rows}};
  multiply<Words>(block.rows, kLinearPanel / kWidth, rows, Matrix{columns, Fixed<kLinearPanel>()}, steps,
                  Matrix{products, Fixed<kLinearPanel>()}, accumulate, ahead);
}

// Lanes [0, lanes) of values, zeros behind.
template <class T>
Vec load_lanes(const T* values, int lanes) {
  return lanes == kWidth ? load(values) : load_partial(values, lanes);
}

// Converts sums of products to results: for channels [channel, channel + lanes), and then for each row of a block.
struct OfFloats {
  using Out = float;
  OfFloats(const PackedLinearParams&, int, int) {}
  Vec operator()(const RowBlock&, int, const float* sums, Vec addend) const { return load(sums) + addend; }
};

struct OfBFloat16s : OfFloats {
  using Out = BFloat16;
  using OfFloats::OfFloats;
};

struct OfBytes {
  using Out = float;
  OfBytes(const PackedLinearParams& params, int channel, int lanes)
      : p(params), scale(load_lanes(p.scale + channel, lanes)), column_sum(load_lanes(p.column_sum + channel, lanes)) {}
  Vec operator()(const RowBlock& block, int r, const float* sums, Vec addend) const {
    const int64_t row = block.first + r;
    if (p.planes == 2) {
      addend = plane(p.quantization[p.num_rows + row], sums + int64_t{block.count} * kLinearPanel, addend);
    }
    return plane(p.quantization[row], sums, addend);
  }
  Vec plane(const RowQuantization& of, const float* sums, Vec addend) const {
    const Vec product = ByteWords::total(load(sums)) * scale;
    return fma(fma(broadcast(-of.zero_point), column_sum, product), broadcast(of.scale), addend);
  }
  const PackedLinearParams& p;
  Vec scale, column_sum;
};

// y of a block's rows and of a panel's channels.
template <class Meaning>
void write_block(const PackedLinearParams& p, const RowBlock& block, int64_t panel, WordRun run,
                 const float* products) {
  using Out = typename Meaning::Out;
  const int column = static_cast<int>(panel * kLinearPanel), channels = std::min(kLinearPanel, p.out_features - column);
  for (int i = 0; i < channels; i += kWidth) {
    const int lanes = std::min(kWidth, channels - i);
    const Meaning meaning(p, column + i, lanes);
    const Vec bias = p.bias ? load_lanes(static_cast<const Out*>(p.bias) + column + i, lanes) : broadcast(0.0f);
    for (int r = 0; r < block.count; ++r) {
      Out* y = static_cast<Out*>(p.y) + (block.first + r) * p.out_features + column + i;
      const Vec addend = run.first == 0 ? bias : load_lanes(y, lanes);
      Vec value = meaning(block, r, products + r * kLinearPanel + i, addend);
      if (p.gelu && run.end == linear_words(p)) value = gelu(value);
      lanes == kWidth ? store(y, value) : store_partial(y, value, lanes);
    }
  }
}

// An item's panels and blocks of rows.
struct Item {
  Item(const PackedLinearParams& p, int64_t index) {
    const int64_t blocks = linear_blocks(p), parts = p.row_parts;
    first_panel = index / parts * p.group_panels;
    last_panel = std::min(first_panel + p.group_panels, linear_panels(p));
    first_block = blocks * (index % parts) / parts;
    last_block = blocks * (index % parts + 1) / parts;
  }
  int64_t first_panel, last_panel, first_block, last_block;
};

// Words of a panel, and of the panels of `next`, that an item goes through before the next ones, so that the data which
// a thread reads repeatedly stays in L2. Only sums of floats can be continued later.
template <class Words>
constexpr int kRunWords = std::is_same_v<Words, FloatWords> ? kLinearRunWords : INT32_MAX;

// An item's blocks [first, last) of rows, not more than a pass has, times a run of a panel; `following` is fetched
// meanwhile, or its share of that.
template <class Words, class Meaning>
void multiply_blocks(const PackedLinearParams& p, const Item& item, int64_t first, int64_t last, int64_t panel,
                     WordRun run, const uint32_t* following) {
  using Of = Pass<Words>;
  const int64_t blocks = item.last_block - item.first_block;
  PassColumns<Words> columns;
  float products[Of::kBlocks][kLinearRows * kLinearPanel];
  for (int word = run.first; word < run.end;) {
    const int words = std::min(run.end - word, Of::kWords);
    const uint32_t* weight = columns.of(linear_panel(p, panel, word), words);
    for (int64_t b = first; b < last; ++b) {
      const RowBlock block(p, b);
      const uint32_t* packed = block.packed + int64_t{word - p.first_word} * block.rows * Of::kSteps;
      const int64_t fetched = word - run.first + words * (b - item.first_block) / blocks;
      // Shared out over the blocks of the product too: fetched by each of them, lines cost as much as the loads of
      // FMAs.
      const int64_t parts = blocks * product_blocks(block.rows);
      FetchPairs ahead{reinterpret_cast<const char*>(following + fetched * kLinearPanel),
                       static_cast<int>(parts) * Of::kSteps, 2 * ((words + parts - 1) / parts)};
      const typename Of::Accumulate accumulate{word > run.first};
      multiply_panel<Words>(block, packed, weight, words * Of::kSteps, accumulate, ahead, products[b - first]);
    }
    word += words;
  }
  for (int64_t b = first; b < last; ++b) write_block<Meaning>(p, RowBlock(p, b), panel, run, products[b - first]);
}

// The panels of `next` are fetched meanwhile.
template <class Words, class Meaning>
void multiply_item(const PackedLinearParams& p, const Item& item, const Item& next) {
  for (WordRun run{p.first_word, 0}; run.first < p.last_word; run.first = run.end) {
    run.end = p.last_word - run.first < kRunWords<Words> ? p.last_word : run.first + kRunWords<Words>;
    for (int64_t b = item.first_block; b < item.last_block; b += Pass<Words>::kBlocks) {
      const int64_t last = std::min<int64_t>(item.last_block, b + Pass<Words>::kBlocks);
      for (int64_t panel = item.first_panel; panel < item.last_panel; ++panel) {
        const uint32_t* following = run.end < p.last_word
                                        ? linear_panel(p, panel, run.end)
                                        : linear_panel(p, panel - item.first_panel + next.first_panel, p.first_word);
        multiply_blocks<Words, Meaning>(p, item, b, last, panel, run, following);
      }
    }
  }
}

template <class Words, class Meaning>
void multiply_items(const PackedLinearParams& p) {
  const int64_t items = linear_items(p);
  for (int64_t index = (*p.next_item)++; index < items;) {
    const int64_t next = (*p.next_item)++;
    multiply_item<Words, Meaning>(p, Item(p, index), Item(p, std::min(next, items - 1)));
    index = next;
  }
}

// Word k of `count` rows of a block, as their even and their odd bytes.
template <class Count>
void put_split(const RowBlock& block, int64_t k, int row, const uint32_t* words, Count count) {
  uint32_t* const even = block.packed + 2 * k * block.rows + row;
  uint32_t* const odd = even + block.rows;
  for (int r = 0; r < count; ++r) even[r] = words[r] & 0x00ff00ffu;
  for (int r = 0; r < count; ++r) odd[r] = words[r] >> 8 & 0x00ff00ffu;
}

}  // namespace

void pack_linear_rows(const PackedLinearParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kTileWords = 16;  // of all rows are written before the next ones, so that they stay in L1 meanwhile
  const int element_bytes = 4 / linear_word_elements(p.operands);
  const int64_t row_bytes = int64_t{p.in_features} * element_bytes;
  const int64_t words = p.last_word - p.first_word, whole = std::min(words, row_bytes / 4 - p.first_word);
  const bool split = row_words(p) == 2;
  for (int64_t b = begin; b < end; ++b) {
    const RowBlock block(p, b);
    const char* from[kLinearRows];
    for (int r = 0; r < block.rows; ++r) {
      const int64_t row = block.first + r % block.count + r / block.count * p.num_rows;
      from[r] = static_cast<const char*>(p.x) + row * p.x_stride * element_bytes + 4 * int64_t{p.first_word};
    }
    const int64_t fours = block.rows < 4 ? 0 : whole / 4 * 4;
    for (int64_t tile = 0; tile < fours; tile += kTileWords) {
      const int64_t tile_end = std::min(fours, tile + kTileWords);
      for (int r = 0; r < block.rows; r += 4) {
        const int first_row = std::min(r, block.rows - 4);  // the last four may overlap those before
        for (int64_t k = tile; k < tile_end; k += 4) {
          const char* in[4];
          LPD_UNROLL for (int i = 0; i < 4; ++i) in[i] = from[first_row + i] + 4 * k;
          if (!split) {
            transpose_words(in, block.packed + k * block.rows + first_row, block.rows);
            continue;
          }
          uint32_t transposed[16];
          transpose_words(in, transposed, 4);
          for (int i = 0; i < 4; ++i) {
            put_split(block, k + i, first_row, transposed + 4 * i, std::integral_constant<int, 4>());
          }
        }
      }
    }
    for (int r = 0; r < block.rows; ++r) {
      for (int64_t k = fours; k < words; ++k) {
        uint32_t word = 0;
        std::memcpy(&word, from[r] + 4 * k, static_cast<size_t>(k < whole ? 4 : row_bytes % 4));
        if (split) {
          put_split(block, k, r, &word, std::integral_constant<int, 1>());
        } else {
          block.packed[k * block.rows + r] = word;
        }
      }
    }
  }
}

void packed_linear(const PackedLinearParams& p, int64_t, int64_t) {
#if defined(LPD_ISA_AVX512)
  if (p.operands == LinearOperands::kInt8 && cpu_has_vnni()) return multiply_items<VnniByteWords, OfBytes>(p);
  if (p.operands == LinearOperands::kBFloat16 && cpu_has_bfloat16()) {
    return multiply_items<NativeBFloat16Words, OfBFloat16s>(p);
  }
#endif
  switch (p.operands) {
    case LinearOperands::kFloat32: return multiply_items<FloatWords, OfFloats>(p);
    case LinearOperands::kBFloat16: return multiply_items<BFloat16Words, OfBFloat16s>(p);
    case LinearOperands::kInt8: return multiply_items<ByteWords, OfBytes>(p);
    default: throw_unknown("operands", static_cast<int>(p.operands));
  }
}

}  // namespace lpd::LPD_ISA
