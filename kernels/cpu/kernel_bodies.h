// The micro-kernels around products, over rows and over the vocabulary; included like
// product_bodies.h, after it.

// ---- epilogues of linear layers
// -------------------------------------------------------------------

void store_plain(const float* tile, int rows, const TileOutput& output) {
  float* out = static_cast<float*>(output.out);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < output.columns; c += 16) {
      const int n = output.columns - c;
      Lanes x = load(tile + r * kPanelColumns + c);
      if (output.bias != nullptr) x = add(x, load_first(output.bias + c, n));
      store_first(out + r * output.stride + c, x, n < 16 ? n : 16);
    }
  }
}

void store_residual(const float* tile, int rows, const TileOutput& output) {
  float* out = static_cast<float*>(output.out);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < output.columns; c += 16) {
      const int n = output.columns - c;
      Lanes x = load(tile + r * kPanelColumns + c);
      if (output.bias != nullptr) x = add(x, load_first(output.bias + c, n));
      float* target = out + r * output.stride + c;
      store_first(target, add(load_first(target, n), x), n < 16 ? n : 16);
    }
  }
}

// exp_f32() of polynomial.h, lane by lane, for x that is at most 0 or NaN: nothing overflows.
inline Lanes exp_of_nonpositive(Lanes x) {
  const Lanes t = fma(x, broadcast(kExpLog2e), broadcast(kExpRound));
  const Lanes n = sub(t, broadcast(kExpRound));
  const Lanes r = fma(n, broadcast(-kExpLn2Low), fma(n, broadcast(-kExpLn2High), x));
  Lanes q = fma(broadcast(kExpQ4), r, broadcast(kExpQ3));
  q = fma(q, r, broadcast(kExpQ2));
  q = fma(q, r, broadcast(kExpQ1));
  q = fma(q, r, broadcast(kExpQ0));
  const Lanes p = fma(fma(q, r, broadcast(1.0f)), r, broadcast(1.0f));
  return select(less(x, broadcast(kExpCutoff)), broadcast(0.0f), scale_by_power(p, t));
}

// exp_f32() of polynomial.h, lane by lane.
inline Lanes exp(Lanes x) {
  const Lanes y = exp_of_nonpositive(x);
  return select(less(broadcast(kExpOverflow), x), broadcast(__builtin_inff()),
                select(is_nan(x), x, y));
}

template <class Step>
void store_gated(const float* tile, int rows, const TileOutput& output) {
  auto* out = static_cast<typename Step::Element*>(output.out);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < output.columns; c += 16) {
      const int n = output.columns - c;
      Lanes gate = load(tile + r * kPanelColumns + c);
      Lanes up = load(tile + r * kPanelColumns + kPanelColumns / 2 + c);
      if (output.bias != nullptr) {
        gate = add(gate, load_first(output.bias + c, n));
        up = add(up, load_first(output.bias + output.up_bias + c, n));
      }
      const Lanes minus = sub(broadcast(0.0f), gate);
      const Lanes silu = div(gate, add(broadcast(1.0f), exp(minus)));
      Step::store_rounded(out + r * output.stride + c, mul(silu, up), n);
    }
  }
}

// ---- rows ---------------------------------------------------------------------------------------

template <class Step>
void rms_norm(const float* in, const float* weight, int64_t n, float epsilon,
              typename Step::Element* out) {
  Lanes sum = broadcast(0.0f);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const Lanes x = load(in + i);
    sum = fma(x, x, sum);
  }
  if (i < n) {
    const Lanes x = load_first(in + i, static_cast<int>(n - i));
    sum = fma(x, x, sum);
  }
  const float mean = sum_lanes(sum) / static_cast<float>(n);
  const Lanes scale = broadcast(1.0f / __builtin_sqrtf(mean + epsilon));
  for (i = 0; i < n; i += 16) {
    const int left = n - i < 16 ? static_cast<int>(n - i) : 16;
    const Lanes x = mul(load_first(in + i, left), scale);
    Step::store_rounded(out + i, mul(x, load_first(weight + i, left)), left);
  }
}

// Rounds and stores lanes, and sets lanes of `bad` to 1 where the result is not finite.
template <class Step>
inline __attribute__((always_inline)) void store_checked(typename Step::Element* out, Lanes x,
                                                         int n, Lanes& bad) {
  Step::store_rounded(out, x, n);
  const Lanes magnitude = max(x, sub(broadcast(0.0f), x));
  bad = select(less(magnitude, broadcast(Step::kOverflow)), bad, broadcast(1.0f));
}

template <class Step>
bool rotate_head(const float* in, const float* table, int64_t n, typename Step::Element* out) {
  const int64_t half = n / 2;
  Lanes bad = broadcast(0.0f);
  for (int64_t i = 0; i < half; i += 16) {
    const int left = half - i < 16 ? static_cast<int>(half - i) : 16;
    const Lanes low = load_first(in + i, left), high = load_first(in + half + i, left);
    const Lanes cosine = load_first(table + i, left), sine = load_first(table + half + i, left);
    store_checked<Step>(out + i, sub(mul(low, cosine), mul(high, sine)), left, bad);
    store_checked<Step>(out + half + i, add(mul(high, cosine), mul(low, sine)), left, bad);
  }
  return max_lanes(bad) == 0.0f;
}

template <class Step>
bool round_row(const float* in, int64_t n, typename Step::Element* out) {
  Lanes bad = broadcast(0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const int left = n - i < 16 ? static_cast<int>(n - i) : 16;
    store_checked<Step>(out + i, load_first(in + i, left), left, bad);
  }
  return max_lanes(bad) == 0.0f;
}

bool all_finite(const float* x, int64_t n) {
  // x - x is 0 where x is finite and NaN where it is not.
  Lanes difference = broadcast(0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const int left = n - i < 16 ? static_cast<int>(n - i) : 16;
    const Lanes lanes = load_first(x + i, left);
    difference = add(difference, sub(lanes, lanes));
  }
  const float sum = sum_lanes(difference);
  return sum == sum;
}
