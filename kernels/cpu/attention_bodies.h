// The micro-kernels of attention over paged keys and values; included like kernel_bodies.h, after
// it. Layouts: a key page is [K / 2][16 tokens][2] in bf16 and [K][16 tokens] in f32; a value page
// is [8 token pairs][columns][2] and [16 tokens][columns].

template <class Step, int kRows, int kPages>
inline __attribute__((always_inline)) void score_pages(
    const typename Step::Element* q, int64_t q_stride, const typename Step::Element* const* pages,
    int64_t steps, float scale, float* scores) {
  const typename Step::Element* columns[kPages];
  for (int page = 0; page < kPages; ++page) columns[page] = pages[page];
  Accumulators<kRows, kPages> acc;
  clear(acc);
  accumulate<Step, kRows, kPages>(acc, q, q_stride, columns, kPageTokens * Step::kWidth, steps);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int page = 0; page < kPages; ++page) {
      store(scores + r * kChunkKeys + page * kPageTokens,
            mul(acc.at[r][page], broadcast(scale)));
    }
  }
}

template <class Step>
void page_scores(const typename Step::Element* q, int64_t q_stride, int rows,
                 const typename Step::Element* const* pages, int num_pages, int64_t steps,
                 float scale, float* scores) {
  constexpr int kVectors = kVectorsPerPass;
  for_row_passes(rows, [&]<int kRows>(int first) __attribute__((always_inline)) {
    const typename Step::Element* rows_q = q + first * q_stride;
    float* rows_out = scores + first * kChunkKeys;
    int page = 0;
    for (; page + kVectors <= num_pages; page += kVectors) {
      score_pages<Step, kRows, kVectors>(rows_q, q_stride, pages + page, steps, scale,
                                         rows_out + page * kPageTokens);
    }
    for (; page < num_pages; ++page) {
      score_pages<Step, kRows, 1>(rows_q, q_stride, pages + page, steps, scale,
                                  rows_out + page * kPageTokens);
    }
  });
}

template <class Step>
void chunk_softmax(const float* scores, int num_pages, int begin, int end,
                   typename Step::Element* p, float* max_out, float* sum_out) {
  const Lanes lowest = broadcast(-__builtin_inff());
  Lanes x[kChunkPages];
  Lanes highest = lowest;
  for (int page = 0; page < num_pages; ++page) {
    const int first = page * kPageTokens;
    x[page] = load(scores + first);
    if (end - first < kPageTokens) x[page] = select(first_lanes(end - first), x[page], lowest);
    if (begin > first) x[page] = select(first_lanes(begin - first), lowest, x[page]);
    highest = max(highest, x[page]);
  }
  const float m = max_lanes(highest);
  Lanes sum = broadcast(0.0f);
  for (int page = 0; page < num_pages; ++page) {
    const Lanes e = exp(sub(x[page], broadcast(m)));
    sum = add(sum, e);
    Step::store_rounded(p + page * kPageTokens, e, 16);
  }
  *max_out = m;
  *sum_out = sum_lanes(sum);
}

template <class Step, int kRows, int kVectors>
inline __attribute__((always_inline)) void weigh_values(
    const typename Step::Element* p, const typename Step::Element* const* pages, int num_pages,
    int64_t first_column, int64_t num_columns, float* out) {
  Accumulators<kRows, kVectors> acc;
  clear(acc);
  for (int page = 0; page < num_pages; ++page) {
    const typename Step::Element* columns[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      columns[v] = pages[page] + (first_column + 16 * v) * Step::kWidth;
    }
    accumulate<Step, kRows, kVectors>(acc, p + page * kPageTokens, kChunkKeys, columns,
                                      num_columns * Step::kWidth, kPageTokens / Step::kWidth);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      // Adding +0 turns -0 into +0: the products of masked keys are zeros of either sign, and how
      // many of them there are depends on the other rows of the tile.
      store(out + r * num_columns + first_column + 16 * v,
            add(acc.at[r][v], broadcast(0.0f)));
    }
  }
}

template <class Step>
void page_values(const typename Step::Element* p, int rows,
                 const typename Step::Element* const* pages, int num_pages, int64_t columns,
                 float* out) {
  constexpr int kVectors = kVectorsPerPass;
  for_row_passes(rows, [&]<int kRows>(int first) __attribute__((always_inline)) {
    const typename Step::Element* rows_p = p + first * kChunkKeys;
    float* rows_out = out + first * columns;
    int64_t column = 0;
    for (; column + 16 * kVectors <= columns; column += 16 * kVectors) {
      weigh_values<Step, kRows, kVectors>(rows_p, pages, num_pages, column, columns, rows_out);
    }
    for (; column < columns; column += 16) {
      weigh_values<Step, kRows, 1>(rows_p, pages, num_pages, column, columns, rows_out);
    }
  });
}

void merge_chunk(float* o, const float* o_chunk, float a, float b, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const int left = n - i < 16 ? static_cast<int>(n - i) : 16;
    const Lanes scaled = mul(load_first(o_chunk + i, left), broadcast(b));
    store_first(o + i, fma(load_first(o + i, left), broadcast(a), scaled), left);
  }
}

template <class Step>
void divide(const float* o, float l, int64_t n, typename Step::Element* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const int left = n - i < 16 ? static_cast<int>(n - i) : 16;
    Step::store_rounded(out + i, div(load_first(o + i, left), broadcast(l)), left);
  }
}
