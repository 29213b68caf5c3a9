// The micro-kernels of attention over paged keys and values; included like kernel_bodies.h, after
// it. Layouts: a key page is [K / 2][16 tokens][2] in bf16 and [K][16 tokens] in f32; a value page
// is [8 token pairs][columns][2] and [16 tokens][columns].

template <class Step, int kRows, int kPages, class Rows>
inline __attribute__((always_inline)) void score_pages(const Rows& q,
                                                       const typename Step::Element* const* pages,
                                                       int64_t steps, float scale, float* scores) {
  SeparateColumns<Step, kPages> columns;
  for (int page = 0; page < kPages; ++page) columns.vectors[page] = pages[page];
  Accumulators<kRows, kPages> acc;
  clear(acc);
  accumulate<Step, kRows, kPages>(acc, q, 0, columns, kPageTokens * Step::kWidth, steps);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int page = 0; page < kPages; ++page) {
      store(scores + r * kChunkKeys + page * kPageTokens, mul(acc.at[r][page], broadcast(scale)));
    }
  }
}

template <class Step>
void page_scores(const typename Step::Element* q, int64_t q_stride, int rows,
                 const typename Step::Element* const* pages, int num_pages, int64_t steps,
                 float scale, float* scores, PagesAhead& ahead) {
  for_row_passes(
      rows, [&]<int kRows>(int first) __attribute__((always_inline)) {
        constexpr int kVectors = vectors_per_pass(kRows);
        const UnpackedRows<Step, kRows, kMaxHeadWidth / Step::kWidth> rows_q(
            {q + first * q_stride, q_stride}, steps);
        float* rows_out = scores + first * kChunkKeys;
        int page = 0;
        for (; page + kVectors <= num_pages; page += kVectors) {
          ahead.advance();
          score_pages<Step, kRows, kVectors>(rows_q, pages + page, steps, scale,
                                             rows_out + page * kPageTokens);
        }
        if constexpr (kVectors > 2) {
          for (; page + 2 <= num_pages; page += 2) {
            score_pages<Step, kRows, 2>(rows_q, pages + page, steps, scale,
                                        rows_out + page * kPageTokens);
          }
        }
        for (; page < num_pages; ++page) {
          ahead.advance();
          score_pages<Step, kRows, 1>(rows_q, pages + page, steps, scale,
                                      rows_out + page * kPageTokens);
        }
      });
}

// Scores of one page with masked keys at -infinity: keys [begin, end) of the chunk are visible.
inline __attribute__((always_inline)) Lanes visible_scores(const float* scores, int page, int begin,
                                                           int end) {
  const Lanes lowest = broadcast(-__builtin_inff());
  const int first = page * kPageTokens;
  Lanes x = load(scores + first);
  if (end - first < kPageTokens) x = select(first_lanes(end - first), x, lowest);
  if (begin > first) x = select(first_lanes(begin - first), lowest, x);
  return x;
}

template <class Step, class Load>
inline __attribute__((always_inline)) void soften_pages(int num_pages, Load load_page,
                                                        typename Step::Element* p, float* max_out,
                                                        float* sum_out) {
  Lanes highest = broadcast(-__builtin_inff());
  for (int page = 0; page < num_pages; ++page) highest = max(highest, load_page(page));
  const float m = max_lanes(highest);
  Lanes sum = broadcast(0.0f);
  for (int page = 0; page < num_pages; ++page) {
    const Lanes e = exp_of_nonpositive(sub(load_page(page), broadcast(m)));
    sum = add(sum, e);
    Step::store_rounded(p + page * kPageTokens, e, 16);
  }
  *max_out = m;
  *sum_out = sum_lanes(sum);
}

template <class Step>
void chunk_softmax(const float* scores, int num_pages, int begin, int end,
                   typename Step::Element* p, float* max_out, float* sum_out) {
  if (begin <= 0 && end >= num_pages * kPageTokens) {
    soften_pages<Step>(
        num_pages, [&](int page) { return load(scores + page * kPageTokens); }, p, max_out,
        sum_out);
  } else {
    soften_pages<Step>(
        num_pages, [&](int page) { return visible_scores(scores, page, begin, end); }, p, max_out,
        sum_out);
  }
}

template <class Step, int kRows, int kVectors, class Rows>
inline __attribute__((always_inline)) void weigh_values(const Rows& p,
                                                        const typename Step::Element* const* pages,
                                                        int num_pages, int64_t first_column,
                                                        int64_t num_columns, bool continues,
                                                        float* out, PagesAhead& ahead) {
  constexpr int64_t kPageSteps = kPageTokens / Step::kWidth;
  Accumulators<kRows, kVectors> acc;
  load_or_clear(acc, continues, out + first_column, num_columns);
  for (int page = 0; page < num_pages; ++page) {
    if (page % 4 == 0) ahead.advance();
    const AdjacentColumns<Step> columns = {pages[page] + first_column * Step::kWidth};
    accumulate<Step, kRows, kVectors>(acc, p, page * kPageSteps, columns,
                                      num_columns * Step::kWidth, kPageSteps);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      // Adding +0 turns -0 into +0: the products of masked keys are zeros of either sign, and how
      // many of them there are depends on the other rows of the tile.
      store(out + r * num_columns + first_column + 16 * v, add(acc.at[r][v], broadcast(0.0f)));
    }
  }
}

template <class Step>
void page_values(const typename Step::Element* p, int rows,
                 const typename Step::Element* const* pages, int num_pages, int64_t columns,
                 bool continues, float* out, PagesAhead& ahead) {
  for_row_passes(
      rows, [&]<int kRows>(int first) __attribute__((always_inline)) {
        constexpr int kVectors = vectors_per_pass(kRows);
        const UnpackedRows<Step, kRows, kChunkKeys / Step::kWidth> rows_p(
            {p + first * kChunkKeys, kChunkKeys}, num_pages * kPageTokens / Step::kWidth);
        float* rows_out = out + first * columns;
        int64_t column = 0;
        for (; column + 16 * kVectors <= columns; column += 16 * kVectors) {
          weigh_values<Step, kRows, kVectors>(rows_p, pages, num_pages, column, columns, continues,
                                              rows_out, ahead);
        }
        for (; column < columns; column += 16) {
          weigh_values<Step, kRows, 1>(rows_p, pages, num_pages, column, columns, continues,
                                       rows_out, ahead);
        }
      });
}

void merge_chunk(float* o, SoftmaxState* state, const float* o_chunk, float chunk_max,
                 float chunk_sum, int64_t n) {
  const Lanes before = broadcast(state->max), chunk = broadcast(chunk_max);
  const Lanes merged = max(before, chunk);
  const Lanes a = exp_of_nonpositive(sub(before, merged));
  const Lanes b = exp_of_nonpositive(sub(chunk, merged));
  for (int64_t i = 0; i < n; i += 16) {
    store(o + i, fma(load(o + i), a, mul(load(o_chunk + i), b)));
  }
  float lanes[16];
  store(lanes, fma(broadcast(state->sum), a, mul(broadcast(chunk_sum), b)));
  state->sum = lanes[0];
  store(lanes, merged);
  state->max = lanes[0];
}

template <class Step>
void divide(const float* o, float l, int64_t n, typename Step::Element* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const int left = n - i < 16 ? static_cast<int>(n - i) : 16;
    Step::store_rounded(out + i, div(load_first(o + i, left), broadcast(l)), left);
  }
}
