// 16 f32 lanes as a plain array; the definition that the vector versions must match bit for bit.
// Included inside a namespace, after <bit>, <cmath> and <cstdint>.

// Of one register tile: rows, and vectors of columns at so many rows.
inline constexpr int kRowsPerPass = 6;
inline constexpr int kVectorRegisters = 1;
constexpr int vectors_per_pass(int) { return 1; }

struct Lanes {
  float x[16];
};
struct Pairs {
  uint32_t x[16];  // low half: even element, high half: odd element
};
using LaneMask = uint32_t;

template <class F>
inline Lanes each_lane(F f) {
  Lanes result;
  for (int i = 0; i < 16; ++i) result.x[i] = f(i);
  return result;
}

inline Lanes broadcast(float value) {
  return each_lane([&](int) { return value; });
}
inline Lanes load(const float* p) {
  return each_lane([&](int i) { return p[i]; });
}
inline Lanes load_first(const float* p, int n) {
  return each_lane([&](int i) { return i < n ? p[i] : 0.0f; });
}
inline void store(float* p, Lanes a) {
  for (int i = 0; i < 16; ++i) p[i] = a.x[i];
}
inline void store_first(float* p, Lanes a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.x[i];
}
inline Lanes add(Lanes a, Lanes b) {
  return each_lane([&](int i) { return a.x[i] + b.x[i]; });
}
inline Lanes sub(Lanes a, Lanes b) {
  return each_lane([&](int i) { return a.x[i] - b.x[i]; });
}
inline Lanes mul(Lanes a, Lanes b) {
  return each_lane([&](int i) { return a.x[i] * b.x[i]; });
}
inline Lanes div(Lanes a, Lanes b) {
  return each_lane([&](int i) { return a.x[i] / b.x[i]; });
}
// As MAXPS: the second operand where one is NaN or both are zeros.
inline Lanes max(Lanes a, Lanes b) {
  return each_lane([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return each_lane([&](int i) { return std::fmaf(a.x[i], b.x[i], c.x[i]); });
}

inline LaneMask first_lanes(int n) { return n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1u; }
inline LaneMask less(Lanes a, Lanes b) {
  LaneMask mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (a.x[i] < b.x[i] ? 1u : 0u) << i;
  return mask;
}
inline LaneMask is_nan(Lanes a) {
  LaneMask mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (a.x[i] != a.x[i] ? 1u : 0u) << i;
  return mask;
}
inline uint32_t bits_of(LaneMask mask) { return mask; }
inline LaneMask lanes_of(uint32_t bits) { return bits & 0xffffu; }
inline Lanes select(LaneMask mask, Lanes a, Lanes b) {
  return each_lane([&](int i) { return (mask >> i & 1u) != 0 ? a.x[i] : b.x[i]; });
}
// p * 2^n with n in the low bits of t; see exp_f32().
inline Lanes scale_by_power(Lanes p, Lanes t) {
  return each_lane([&](int i) {
    return std::bit_cast<float>(std::bit_cast<uint32_t>(p.x[i]) +
                                (std::bit_cast<uint32_t>(t.x[i]) << 23));
  });
}

inline Pairs load_pairs(const uint16_t* p) {
  Pairs result;
  for (int i = 0; i < 16; ++i) {
    result.x[i] = static_cast<uint32_t>(p[2 * i]) | static_cast<uint32_t>(p[2 * i + 1]) << 16;
  }
  return result;
}
inline Pairs broadcast_pair(const uint16_t* p) {
  Pairs result;
  for (uint32_t& x : result.x) x = static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 16;
  return result;
}
inline constexpr int kPairParts = 1;  // instructions that add a product of pairs to a sum
template <int kPart>
inline Pairs pair_part(Pairs pairs) {
  return pairs;
}
inline Lanes odd_lanes(Pairs pairs) {
  return each_lane([&](int i) { return std::bit_cast<float>(pairs.x[i] & 0xffff0000u); });
}
inline Lanes even_lanes(Pairs pairs) {
  return each_lane([&](int i) { return std::bit_cast<float>(pairs.x[i] << 16); });
}
inline Lanes fma_pairs(Lanes acc, Pairs a, Pairs b) {
  return each_lane([&](int i) {
    const float odd = std::fmaf(std::bit_cast<float>(a.x[i] & 0xffff0000u),
                                std::bit_cast<float>(b.x[i] & 0xffff0000u), acc.x[i]);
    return std::fmaf(std::bit_cast<float>(a.x[i] << 16), std::bit_cast<float>(b.x[i] << 16), odd);
  });
}
inline void store_bf16_first(uint16_t* p, Lanes a, int n) {
  for (int i = 0; i < n; ++i) p[i] = f32_to_bf16(a.x[i]);
}
inline void store_bf16(uint16_t* p, Lanes a) { store_bf16_first(p, a, 16); }

// Lane i + lane i + 8, then 4, 2, 1: the tree of every sum over a row.
inline float sum_lanes(Lanes a) {
  for (int half = 8; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) a.x[i] = a.x[i] + a.x[i + half];
  }
  return a.x[0];
}
inline float max_lanes(Lanes a) {
  for (int half = 8; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) a.x[i] = a.x[i] > a.x[i + half] ? a.x[i] : a.x[i + half];
  }
  return a.x[0];
}
