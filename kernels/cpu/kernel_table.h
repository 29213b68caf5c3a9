// The micro-kernels that exist once per instruction set, as a table of functions. Everything else
// (loops over panels, sequences and rows, threads) is written once, above this table.
//
// All functions give the same bits on every instruction set, provided that the thread flushes
// subnormals (float_mode.h). Element is uint16_t (bf16) or float.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/isa.h"

namespace rollpack::kernels::cpu {

inline constexpr int kPanelColumns = 64;  // output columns of a packed weight panel
inline constexpr int kTileRows = 6;       // 6 x 4 zmm accumulators + 4 weights + 1 input = 29 of 32
// Heads of a row are worked on in buffers on the stack; wider ones are refused at construction.
inline constexpr int kMaxHeadWidth = 512;
inline constexpr int kPageTokens = 16;  // tokens of a KV page: one 16-lane vector of scores
inline constexpr int kChunkKeys = 256;  // keys of an attention chunk
inline constexpr int kChunkPages = kChunkKeys / kPageTokens;

// Panels of a vocabulary block: one lane of a vector each.
inline constexpr int kBlockPanels = 16;

// Sums over the columns of each panel of a vocabulary block, of logits x scaled and rounded once.
struct alignas(64) BlockPanels {
  float max[kBlockPanels];       // m
  float sum[kBlockPanels];       // sum of exp(x - m)
  float weighted[kBlockPanels];  // sum of (x - m) exp(x - m), for the entropy

  // Panels past the vocabulary: no mass.
  static constexpr BlockPanels empty() {
    BlockPanels panels{};
    for (float& max : panels.max) max = -__builtin_inff();
    return panels;
  }
};

// The same over the whole block.
struct BlockStats {
  float max = 0;        // m: the largest x
  double sum = 0;       // of exp(x - m)
  double weighted = 0;  // of (x - m) exp(x - m)
};

// One row of a tile of logits, to be reduced at one temperature into a lane of `block`.
struct LogitsRow {
  const float* logits = nullptr;  // [64]
  float scale = 1.0f;
  BlockPanels* block = nullptr;
};

// Columns of a panel as bits: those above a limit, and those equal to it.
struct PanelMask {
  uint64_t above = 0;
  uint64_t equal = 0;
};

// What a cut keeps of a panel.
struct PanelKept {
  uint64_t columns = 0;
  float mass = 0;
};

// Entries of a list from some value on.
struct ListShare {
  double weight = 0;
  int64_t count = 0;
};

// Page blocks that attention reads next: kernels bring `lines_per_call` cache lines of them into L2
// at each pass over pages, so that reading memory and multiplying overlap.
struct PagesAhead {
  const std::byte* pages[kChunkPages] = {};
  int count = 0;
  int64_t lines_per_page = 0;
  int64_t lines_per_call = 0;
  int page = 0;  // where the next call goes on
  int64_t line = 0;

  void advance() {
    for (int64_t n = 0; n < lines_per_call && page < count; ++n) {
      __builtin_prefetch(pages[page] + line * 64, 0, 2);
      if (++line < lines_per_page) continue;
      line = 0;
      ++page;
    }
  }
};

// Of the chunks of one attention row that are merged so far.
struct SoftmaxState {
  float max = 0;  // m
  float sum = 0;  // l: of exp(s - m)
};

// What a finished tile becomes; see Epilogue in backend.h. `out` points at the tile's first
// element.
struct TileOutput {
  const float* bias = nullptr;  // of the tile's columns (gated: of its gate columns), or none
  int64_t up_bias = 0;          // gated: where the bias of the up columns starts, from bias
  void* out = nullptr;
  int64_t stride = 0;  // elements from row to row of out
  int columns = 0;     // valid output columns: at most 64, for gated tiles 32
};

// What a panel product does besides its sums.
struct PanelPass {
  bool continues = false;       // the sums start from `tile`, not from 0: a later part of k
  const void* ahead = nullptr;  // memory to bring into L2 meanwhile: what the caller reads next
  int64_t ahead_lines = 0;      // cache lines of it
  bool streams = false;         // nothing has brought the panel in: it comes from memory
  // Rows of the next call, a_stride apart, or none: its steps of them are brought into L1.
  const void* next_rows = nullptr;
};

// Brings the next lines of what a product reads next into L2, a share of them at each look.
struct LinesAhead {
  const char* next;
  const char* end;
  int64_t per_look;

  LinesAhead(const PanelPass& pass, int64_t steps, int64_t steps_per_look)
      : next(static_cast<const char*>(pass.ahead)),
        end(next + pass.ahead_lines * 64),
        per_look(steps > 0 ? (pass.ahead_lines * steps_per_look + steps - 1) / steps : 0) {}
  void look() {
    for (int64_t line = 0; line < per_look && next < end; ++line, next += 64) {
      __builtin_prefetch(next, 0, 2);
    }
  }
};

// The kernels that depend on the compute dtype.
template <class Element>
struct ElementKernels {
  // tile[r][n] = sum over steps ascending of a[r] * panel[.][n], r < rows <= kTileRows, n < 64.
  // One step is a pair of k in bf16 (odd element first), a single k in f32.
  void (*panel_product)(const Element* a, int64_t a_stride, int rows, const Element* panel,
                        int64_t steps, float* tile, const PanelPass& pass);
  // out[r][c] = silu(tile[r][c]) * tile[r][c + 32], rounded once.
  void (*store_gated)(const float* tile, int rows, const TileOutput& output);
  // out[d] = (in[d] * (1 / sqrt(sum(in^2) / n + epsilon))) * weight[d], rounded once.
  void (*rms_norm)(const float* in, const float* weight, int64_t n, float epsilon, Element* out);
  // Rotates pairs (i, i + n / 2) of a head by a row of the table ([n / 2] cosines, then sines) and
  // rounds; false if some element is not finite then.
  bool (*rotate_head)(const float* in, const float* table, int64_t n, Element* out);
  // Rounds n elements; false if some element is not finite then.
  bool (*round_row)(const float* in, int64_t n, Element* out);
  // scores[r][token] = scale * (q[r] . k[token]) for the tokens of num_pages <= 16 key pages;
  // scores has kChunkKeys columns.
  void (*page_scores)(const Element* q, int64_t q_stride, int rows, const Element* const* pages,
                      int num_pages, int64_t steps, float scale, float* scores, PagesAhead& ahead);
  // Softmax numerators of one row of scores: keys [begin, end) of its num_pages * 16 are visible.
  // p = exp(s - max), rounded to Element and 0 outside; max and sum (of unrounded p) come out.
  void (*chunk_softmax)(const float* scores, int num_pages, int begin, int end, Element* p,
                        float* max, float* sum);
  // out[r][c] = sum over tokens ascending of p[r] * v[.][c]; columns is a multiple of 16 and the
  // width of a value page; p has kChunkKeys columns. continues: the sums start from out, not from
  // 0. Zero sums are +0.
  void (*page_values)(const Element* p, int rows, const Element* const* pages, int num_pages,
                      int64_t columns, bool continues, float* out, PagesAhead& ahead);
  // out[c] = o[c] / l, rounded once.
  void (*divide)(const float* o, float l, int64_t n, Element* out);
  // Packs `count` <= 16 rows of n elements, row_bytes apart and aligned anyhow, into columns
  // [0, count) of a panel (packing.h) that starts at `panel`. bf16: subnormals become zeros, NaN
  // quiet, as in rounding; an odd n is followed by one 0.
  void (*pack_columns)(const std::byte* rows, int64_t row_bytes, int count, int64_t n,
                       Element* panel);
};

struct KernelTable {
  Isa isa = Isa::kPortable;
  ElementKernels<uint16_t> bf16;
  ElementKernels<float> f32;

  // bf16 operands as f32: a product over pairs becomes one over twice as many single steps, with
  // the same bits. Of a row, for each pair: out[2 i] = in[2 i + 1] and out[2 i + 1] = in[2 i]. Of a
  // panel, out [2 steps][64]: first the odd, then the even elements of a step.
  void (*widen_pairs)(const uint16_t* in, int64_t pairs, float* out);
  void (*widen_panel)(const uint16_t* panel, int64_t steps, float* out);
  // out = tile (+ bias), and out += tile (+ bias).
  void (*store_plain)(const float* tile, int rows, const TileOutput& output);
  void (*store_residual)(const float* tile, int rows, const TileOutput& output);
  // Merges an attention chunk (o_chunk, max, sum) into what came before it (o and *state).
  void (*merge_chunk)(float* o, SoftmaxState* state, const float* o_chunk, float max, float sum,
                      int64_t n);
  // Lane `lane` of each row's block: sums over its first `columns` logits, multiplied by its scale.
  void (*panel_stats)(const LogitsRow* rows, int count, int columns, int lane, bool with_weighted);
  // Merges the panels of a block, in order, in f64.
  BlockStats (*merge_panels)(const BlockPanels& panels, bool with_weighted);
  // Compares logits[c] x scale, c < columns, with a limit. NaN counts as equal.
  PanelMask (*compare_panel)(const float* logits, int columns, float scale, float limit);
  // Of the given columns those with p = exp(logits[c] x scale - max) >= min_mass, and the lane sum
  // of their p. Reads all 64 logits, finite in those columns.
  PanelKept (*panel_mass)(const float* logits, uint64_t columns, float scale, float max,
                          float min_mass);
  // Entries with x[i] >= limit and the sum of their weights, 1 each where `weights` is null: lane
  // sums over 1024 entries at a time, added in f64 in order.
  ListShare (*share_from)(const float* x, const float* weights, int64_t n, float limit);
  bool (*all_finite)(const float* x, int64_t n);
  // out[i] = exp(x[i] * scale - max).
  void (*shifted_exp)(const float* x, int64_t n, float scale, float max, float* out);

  template <class Element>
  const ElementKernels<Element>& of() const {
    if constexpr (sizeof(Element) == 2) {
      return bf16;
    } else {
      return f32;
    }
  }
};

// The table of an instruction set that supported_isas() lists.
const KernelTable& kernel_table(Isa isa);

}  // namespace rollpack::kernels::cpu
