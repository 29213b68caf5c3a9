// Products, written once over the lanes of an instruction set. Included inside that instruction
// set's namespace, after its lanes header; every instruction set compiles its own copy. The order
// of operations here and in the other bodies IS the numerics contract of kernels/cpu/README.md.

// ---- steps of a product: a pair of bf16 or one f32 ----------------------------------------------

// A step is added in kParts parts, in order: where a pair takes two FMAs, all sums of a tile first
// get the odd elements, then the even ones, so that few unpacked columns are in registers at once.

struct PairStep {
  using Element = uint16_t;
  static constexpr int kWidth = 2;                 // elements of k in a step
  static constexpr float kOverflow = 0x1.ffp127f;  // from here on a magnitude rounds to infinity
  static constexpr int kParts = kPairParts;
  template <int kPart>
  static auto load_columns(const Element* p) {
    return pair_part<kPart>(load_pairs(p));
  }
  template <int kPart>
  static auto broadcast_row(const Element* p) {
    return pair_part<kPart>(broadcast_pair(p));
  }
  template <class Part>
  static Lanes multiply_add(Lanes acc, Part a, Part b) {
    if constexpr (kParts == 2) {
      return fma(a, b, acc);
    } else {
      return fma_pairs(acc, a, b);
    }
  }
  static void store_rounded(Element* p, Lanes a, int n) {
    if (n >= 16) {
      store_bf16(p, a);
    } else {
      store_bf16_first(p, a, n);
    }
  }
};

struct SingleStep {
  using Element = float;
  static constexpr int kWidth = 1;
  static constexpr float kOverflow = __builtin_inff();
  static constexpr int kParts = 1;
  template <int kPart>
  static Lanes load_columns(const Element* p) {
    return load(p);
  }
  template <int kPart>
  static Lanes broadcast_row(const Element* p) {
    return broadcast(*p);
  }
  static Lanes multiply_add(Lanes acc, Lanes a, Lanes b) { return fma(a, b, acc); }
  static void store_rounded(Element* p, Lanes a, int n) {
    if (n >= 16) {
      store(p, a);
    } else {
      store_first(p, a, n);
    }
  }
};

template <int kRows, int kVectors>
struct Accumulators {
  Lanes at[kRows][kVectors];
};

// Input rows of a register tile where they lie.
template <class Step>
struct RowsInPlace {
  const typename Step::Element* first;
  int64_t stride;
  template <int kPart>
  auto at(int row, int64_t step) const {
    return Step::template broadcast_row<kPart>(first + row * stride + step * Step::kWidth);
  }
};

// Input rows of at most kMaxSteps steps: in place, or where unpacking a pair takes instructions of
// its own, a copy of both parts that is made once for all columns.
template <class Step, int kRows, int kMaxSteps, int kParts = Step::kParts>
struct UnpackedRows : RowsInPlace<Step> {
  UnpackedRows(const RowsInPlace<Step>& rows, int64_t) : RowsInPlace<Step>(rows) {}
};
template <class Step, int kRows, int kMaxSteps>
struct UnpackedRows<Step, kRows, kMaxSteps, 2> {
  alignas(64) float parts[2][kRows][kMaxSteps];

  UnpackedRows(const RowsInPlace<Step>& rows, int64_t steps) {
    for (int r = 0; r < kRows; ++r) {
      const typename Step::Element* const row = rows.first + r * rows.stride;
      for (int64_t s = 0; s < steps; s += 16) {
        const auto pairs = load_pairs_first(row + s * Step::kWidth, static_cast<int>(steps - s));
        store(parts[0][r] + s, pair_part<0>(pairs));
        store(parts[1][r] + s, pair_part<1>(pairs));
      }
    }
  }
  template <int kPart>
  Lanes at(int row, int64_t step) const {
    return broadcast(parts[kPart][row][step]);
  }
};

// The columns of a register tile's vectors at its first step: side by side, which takes one address
// for all of them, or each in a place of its own.
template <class Step>
struct AdjacentColumns {
  const typename Step::Element* first;
  const typename Step::Element* at(int vector) const { return first + vector * 16 * Step::kWidth; }
};
template <class Step, int kVectors>
struct SeparateColumns {
  const typename Step::Element* vectors[kVectors];
  const typename Step::Element* at(int vector) const { return vectors[vector]; }
};

// Adds part kPart of one step to kRows x (16 kVectors) sums. The columns of vector v lie at
// columns.at(v) + offset.
template <class Step, int kPart, int kRows, int kVectors, class Rows, class Columns>
inline __attribute__((always_inline)) void accumulate_part(Accumulators<kRows, kVectors>& acc,
                                                           const Rows& rows, int64_t step,
                                                           const Columns& columns,
                                                           int64_t offset) {
  using Row = decltype(rows.template at<kPart>(0, 0));
  if constexpr (kRows < kVectors * kVectorRegisters) {  // fewer registers than the columns are
    Row x[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) x[r] = rows.template at<kPart>(r, step);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const auto b = Step::template load_columns<kPart>(columns.at(v) + offset);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        acc.at[r][v] = Step::multiply_add(acc.at[r][v], x[r], b);
      }
    }
  } else {
    decltype(Step::template load_columns<kPart>(columns.at(0))) b[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      b[v] = Step::template load_columns<kPart>(columns.at(v) + offset);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Row x = rows.template at<kPart>(r, step);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        acc.at[r][v] = Step::multiply_add(acc.at[r][v], x, b[v]);
      }
    }
  }
}

// One register tile: kRows x (16 kVectors) sums over `steps` steps of the rows from first_step on,
// one chain an element. The columns of vector v at the s-th of them lie at columns.at(v) + s *
// column_stride. steps_ahead: how many steps before their use columns are brought into L1, 0: not
// at all.
template <class Step, int kRows, int kVectors, class Rows, class Columns>
inline __attribute__((always_inline)) void accumulate(Accumulators<kRows, kVectors>& acc,
                                                      const Rows& rows, int64_t first_step,
                                                      const Columns& columns,
                                                      int64_t column_stride, int64_t steps,
                                                      int64_t steps_ahead = 0) {
  for (int64_t s = 0; s < steps; ++s) {
    if (steps_ahead > 0) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        __builtin_prefetch(columns.at(v) + (s + steps_ahead) * column_stride, 0, 3);
      }
    }
    accumulate_part<Step, 0, kRows, kVectors>(acc, rows, first_step + s, columns,
                                              s * column_stride);
    if constexpr (Step::kParts == 2) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) end_part(acc.at[r][v]);
      }
      accumulate_part<Step, 1, kRows, kVectors>(acc, rows, first_step + s, columns,
                                                s * column_stride);
    }
  }
}

template <int kRows, int kVectors>
inline __attribute__((always_inline)) void clear(Accumulators<kRows, kVectors>& acc) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc.at[r][v] = broadcast(0.0f);
  }
}

// Where a sum that goes on is taken up again: row r, vector v of it lies at sums + r stride + 16 v.
template <int kRows, int kVectors>
inline __attribute__((always_inline)) void load_or_clear(Accumulators<kRows, kVectors>& acc,
                                                         bool continues, const float* sums,
                                                         int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      acc.at[r][v] = continues ? load(sums + r * stride + v * 16) : broadcast(0.0f);
    }
  }
}

template <int kRows, int kVectors>
inline __attribute__((always_inline)) void store_sums(const Accumulators<kRows, kVectors>& acc,
                                                      float* sums, int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(sums + r * stride + v * 16, acc.at[r][v]);
  }
}

// Calls body.template operator()<n>(first_row) over rows in passes of at most kRowsPerPass, as
// equal as possible: 7 rows are 4 + 3, since a pass of 1 waits longer for its chains than one of 3.
template <class Body>
inline __attribute__((always_inline)) void for_row_passes(int rows, Body body) {
  const int passes = (rows + kRowsPerPass - 1) / kRowsPerPass;
  for (int pass = 0; pass < passes; ++pass) {
    const int r = rows * pass / passes;
    switch (rows * (pass + 1) / passes - r) {
      case 1:
        body.template operator()<1>(r);
        break;
      case 2:
        body.template operator()<2>(r);
        break;
      case 3:
        body.template operator()<3>(r);
        break;
      case 4:
        body.template operator()<4>(r);
        break;
      case 5:
        body.template operator()<(kRowsPerPass >= 5 ? 5 : 1)>(r);
        break;
      default:
        body.template operator()<kRowsPerPass>(r);
        break;
    }
  }
}

// ---- a panel ------------------------------------------------------------------------------------

// Steps between two looks at what to prefetch: rare enough to cost nothing, and at the 3 lines that
// 22 row tiles leave each look to bring, far below the loads a core can have in flight.
inline constexpr int64_t kStepsPerLook = 16;

// Brings the rows of the next tile into L1: a line of each holds as many steps as lie between two
// looks.
template <class Step, int kRows>
struct RowsAhead {
  const typename Step::Element* first;
  int64_t stride;
  void look(int64_t step) const {
    if (first == nullptr) return;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(first + r * stride + step * Step::kWidth, 0, 3);
    }
  }
};

// Columns [16 v0, 16 (v0 + kVectors)) of a pass over rows, all steps at a time.
template <class Step, int kRows, int kVectors>
inline __attribute__((always_inline)) void multiply_columns(const RowsInPlace<Step>& rows,
                                                            const typename Step::Element* panel,
                                                            int64_t steps, float* sums,
                                                            bool continues, LinesAhead& ahead,
                                                            RowsAhead<Step, kRows> next_rows) {
  constexpr int64_t kStride = kPanelColumns * Step::kWidth;
  Accumulators<kRows, kVectors> acc;
  load_or_clear(acc, continues, sums, kPanelColumns);
  for (int64_t begin = 0; begin < steps; begin += kStepsPerLook) {
    ahead.look();
    next_rows.look(begin);
    const int64_t count = steps - begin < kStepsPerLook ? steps - begin : kStepsPerLook;
    const AdjacentColumns<Step> columns = {panel + begin * kStride};
    accumulate<Step, kRows, kVectors>(acc, rows, begin, columns, kStride, count);
  }
  store_sums(acc, sums, kPanelColumns);
}

// Steps of a block where the columns of a panel take several passes: 16 KiB of it, which come from
// memory or L2 once and stay in L1 for all passes. Each pass brings its columns of the next block
// in: the hardware's prefetcher does not follow a quarter of each row of a panel. Sums wait in
// `sums` between blocks.
inline constexpr int kStepsPerBlock = 64;

template <class Step, int kRows, int kVectors>
inline __attribute__((always_inline)) void multiply_blocks(const RowsInPlace<Step>& rows,
                                                           const typename Step::Element* panel,
                                                           int64_t steps, float* sums,
                                                           bool continues, LinesAhead& ahead,
                                                           RowsAhead<Step, kRows> next_rows) {
  constexpr int64_t kStride = kPanelColumns * Step::kWidth;
  int64_t begin = 0;
  do {
    for (int64_t look = 0; look < kStepsPerBlock; look += kStepsPerLook) {
      ahead.look();
      next_rows.look(begin + look);
    }
    const int64_t count = steps - begin < kStepsPerBlock ? steps - begin : kStepsPerBlock;
    const UnpackedRows<Step, kRows, kStepsPerBlock> part(
        {rows.first + begin * Step::kWidth, rows.stride}, count);
    for (int v0 = 0; v0 < kPanelColumns / 16; v0 += kVectors) {
      const AdjacentColumns<Step> columns = {panel + begin * kStride + v0 * 16 * Step::kWidth};
      Accumulators<kRows, kVectors> acc;
      load_or_clear(acc, continues || begin > 0, sums + v0 * 16, kPanelColumns);
      accumulate<Step, kRows, kVectors>(acc, part, 0, columns, kStride, count, kStepsPerBlock);
      store_sums(acc, sums + v0 * 16, kPanelColumns);
    }
    begin += count;
  } while (begin < steps);
}

template <class Step>
void panel_product(const typename Step::Element* a, int64_t a_stride, int rows,
                   const typename Step::Element* panel, int64_t steps, float* tile,
                   const PanelPass& pass) {
  LinesAhead ahead(pass, steps, kStepsPerLook);
  for_row_passes(
      rows, [&]<int kRows>(int first) __attribute__((always_inline)) {
        constexpr int kVectors = vectors_per_pass(kRows);
        const RowsInPlace<Step> pass_rows = {a + first * a_stride, a_stride};
        const auto* const next = static_cast<const typename Step::Element*>(pass.next_rows);
        const RowsAhead<Step, kRows> next_rows = {
            next == nullptr ? nullptr : next + first * a_stride, a_stride};
        float* const sums = tile + first * kPanelColumns;
        if constexpr (kVectors * 16 == kPanelColumns) {
          multiply_columns<Step, kRows, kVectors>(pass_rows, panel, steps, sums, pass.continues,
                                                  ahead, next_rows);
        } else {
          multiply_blocks<Step, kRows, kVectors>(pass_rows, panel, steps, sums, pass.continues,
                                                 ahead, next_rows);
        }
      });
}

// ---- operands in f32 ----------------------------------------------------------------------------

void widen_panel(const uint16_t* panel, int64_t steps, float* out) {
  for (int64_t s = 0; s < steps; ++s) {
    for (int v = 0; v < kPanelColumns / 16; ++v) {
      const Pairs pairs = load_pairs(panel + s * 2 * kPanelColumns + v * 32);
      store(out + 2 * s * kPanelColumns + v * 16, odd_lanes(pairs));
      store(out + (2 * s + 1) * kPanelColumns + v * 16, even_lanes(pairs));
    }
  }
}

// A plain loop over words, which the compiler turns into vectors.
void widen_pairs(const uint16_t* in, int64_t pairs, float* out) {
  for (int64_t i = 0; i < pairs; ++i) {
    uint32_t pair;
    __builtin_memcpy(&pair, in + 2 * i, sizeof pair);
    const uint32_t turned[2] = {pair & 0xffff0000u, pair << 16};
    __builtin_memcpy(out + 2 * i, turned, sizeof turned);
  }
}
