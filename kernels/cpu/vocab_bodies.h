// The micro-kernels of the vocabulary head: sums over panels of logits, their merging, cuts.
// Included like kernel_bodies.h, after it, since they use its exp.

// x of vector v of a panel; columns past the vocabulary are -infinity.
inline Lanes scaled_logits(const LogitsRow& row, int v, int columns) {
  const Lanes x = mul(load(row.logits + 16 * v), broadcast(row.scale));
  if (columns >= kPanelColumns) return x;
  return select(first_lanes(columns - 16 * v), x, broadcast(-__builtin_inff()));
}

void panel_stats(const LogitsRow* rows, int count, int columns, int lane, bool with_weighted) {
  constexpr int kVectors = kPanelColumns / 16;
  // All maxima first: a row's exponentials then wait for nothing.
  for (int r = 0; r < count; ++r) {
    // Rounding keeps an order: the largest of the same logits at another scale is the largest one,
    // scaled.
    if (r > 0 && rows[r].logits == rows[r - 1].logits && rows[r - 1].scale == 1.0f) {
      rows[r].block->max[lane] = rows[r - 1].block->max[lane] * rows[r].scale;
      continue;
    }
    Lanes highest = broadcast(-__builtin_inff());
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) highest = max(highest, scaled_logits(rows[r], v, columns));
    rows[r].block->max[lane] = max_lanes(highest);
  }
  for (int r = 0; r < count; ++r) {
    BlockPanels& block = *rows[r].block;
    const Lanes m = broadcast(block.max[lane]);
    Lanes sum = broadcast(0.0f);
    Lanes weighted = broadcast(0.0f);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Lanes d = sub(scaled_logits(rows[r], v, columns), m);
      const Lanes e = exp_of_nonpositive(d);
      sum = add(sum, e);
      // A column past the vocabulary has d = -infinity and e = 0: keep their product 0.
      if (with_weighted) weighted = fma(max(d, broadcast(-1e30f)), e, weighted);
    }
    block.sum[lane] = sum_lanes(sum);
    block.weighted[lane] = with_weighted ? sum_lanes(weighted) : 0.0f;
  }
}

BlockStats merge_panels(const BlockPanels& panels, bool with_weighted) {
  const Lanes maxes = load(panels.max);
  const float m = max_lanes(maxes);
  const Lanes shifts = sub(maxes, broadcast(m));
  float shift[kBlockPanels], factor[kBlockPanels];
  store(shift, max(shifts, broadcast(-1e30f)));  // a panel past the vocabulary: times 0, not NaN
  store(factor, exp_of_nonpositive(shifts));
  BlockStats block = {m, 0, 0};
  for (int p = 0; p < kBlockPanels; ++p) {
    block.sum += static_cast<double>(panels.sum[p]) * static_cast<double>(factor[p]);
  }
  if (!with_weighted) return block;
  for (int p = 0; p < kBlockPanels; ++p) {
    const double sum = static_cast<double>(panels.sum[p]);
    const double weighted = static_cast<double>(panels.weighted[p]);
    block.weighted +=
        (weighted + static_cast<double>(shift[p]) * sum) * static_cast<double>(factor[p]);
  }
  return block;
}

PanelMask compare_panel(const float* logits, int columns, float scale, float limit) {
  const uint64_t valid = columns >= kPanelColumns ? ~uint64_t{0} : (uint64_t{1} << columns) - 1;
  uint64_t above = 0, below = 0;
#pragma GCC unroll 4
  for (int v = 0; v < kPanelColumns / 16; ++v) {
    const Lanes x = mul(load_first(logits + 16 * v, columns - 16 * v), broadcast(scale));
    above |= static_cast<uint64_t>(bits_of(less(broadcast(limit), x))) << (16 * v);
    below |= static_cast<uint64_t>(bits_of(less(x, broadcast(limit)))) << (16 * v);
  }
  return {above & valid, ~(above | below) & valid};
}

PanelKept panel_mass(const float* logits, uint64_t columns, float scale, float max,
                     float min_mass) {
  Lanes sum = broadcast(0.0f);
  uint64_t light = 0;
#pragma GCC unroll 4
  for (int v = 0; v < kPanelColumns / 16; ++v) {
    const LaneMask wanted = lanes_of(static_cast<uint32_t>(columns >> (16 * v)));
    const Lanes x = mul(load(logits + 16 * v), broadcast(scale));
    const Lanes p = exp_of_nonpositive(sub(x, broadcast(max)));
    const LaneMask is_light = less(p, broadcast(min_mass));
    light |= static_cast<uint64_t>(bits_of(is_light)) << (16 * v);
    const Lanes heavy = select(is_light, broadcast(0.0f), p);
    sum = add(sum, select(wanted, heavy, broadcast(0.0f)));
  }
  return {columns & ~light, sum_lanes(sum)};
}

ListShare share_from(const float* x, const float* weights, int64_t n, float limit) {
  ListShare share;
  for (int64_t begin = 0; begin < n; begin += 1024) {
    const int64_t end = n - begin < 1024 ? n : begin + 1024;
    Lanes sum = broadcast(0.0f);
    for (int64_t i = begin; i < end; i += 16) {
      const int left = end - i < 16 ? static_cast<int>(end - i) : 16;
      const uint32_t below = bits_of(less(load_first(x + i, left), broadcast(limit)));
      const uint32_t from = ~below & ((1u << left) - 1);
      const Lanes weight = weights == nullptr ? broadcast(1.0f) : load_first(weights + i, left);
      sum = add(sum, select(lanes_of(from), weight, broadcast(0.0f)));
      share.count += __builtin_popcount(from);
    }
    share.weight += static_cast<double>(sum_lanes(sum));
  }
  return share;
}

void shifted_exp(const float* x, int64_t n, float scale, float max, float* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const int left = n - i < 16 ? static_cast<int>(n - i) : 16;
    const Lanes scaled = mul(load_first(x + i, left), broadcast(scale));
    store_first(out + i, exp(sub(scaled, broadcast(max))), left);
  }
}
