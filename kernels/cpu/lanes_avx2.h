// 16 f32 lanes as two AVX2 registers. Included inside a namespace, after <immintrin.h>, where the
// target pragma allows AVX2 and FMA. Function by function the same bits as lanes_portable.h.

// Register tiles of at most 12 accumulators, beside 2 registers of weights and 1 of inputs of 16:
// 6 rows x 16 columns, which 12 chains keep at two FMAs of latency 4 a cycle with some to spare;
// fewer rows take more columns, up to a panel.
inline constexpr int kRowsPerPass = 6;
inline constexpr int kVectorRegisters = 2;
constexpr int vectors_per_pass(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

struct Lanes {
  __m256 low, high;
};
struct Pairs {
  __m256i low, high;  // 8 pairs each; low half of a pair: even element
};
struct LaneMask {
  __m256 low, high;
};

inline Lanes broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline LaneMask first_lanes(int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i count = _mm256_set1_epi32(n);
  const __m256i upper = _mm256_add_epi32(lane, _mm256_set1_epi32(8));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(count, lane)),
          _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, upper))};
}
inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Lanes load_first(const float* p, int n) {
  const LaneMask mask = first_lanes(n);
  return {_mm256_maskload_ps(p, _mm256_castps_si256(mask.low)),
          _mm256_maskload_ps(p + 8, _mm256_castps_si256(mask.high))};
}
inline void store(float* p, Lanes a) {
  _mm256_storeu_ps(p, a.low);
  _mm256_storeu_ps(p + 8, a.high);
}
inline void store_first(float* p, Lanes a, int n) {
  const LaneMask mask = first_lanes(n);
  _mm256_maskstore_ps(p, _mm256_castps_si256(mask.low), a.low);
  _mm256_maskstore_ps(p + 8, _mm256_castps_si256(mask.high), a.high);
}
inline Lanes add(Lanes a, Lanes b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline Lanes sub(Lanes a, Lanes b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
inline Lanes mul(Lanes a, Lanes b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Lanes div(Lanes a, Lanes b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
inline Lanes max(Lanes a, Lanes b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

inline LaneMask less(Lanes a, Lanes b) {
  return {_mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ)};
}
inline LaneMask is_nan(Lanes a) {
  return {_mm256_cmp_ps(a.low, a.low, _CMP_UNORD_Q), _mm256_cmp_ps(a.high, a.high, _CMP_UNORD_Q)};
}
inline uint32_t bits_of(LaneMask mask) {
  return static_cast<uint32_t>(_mm256_movemask_ps(mask.low)) |
         static_cast<uint32_t>(_mm256_movemask_ps(mask.high)) << 8;
}
inline LaneMask lanes_of(uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i low = _mm256_set1_epi32(static_cast<int32_t>(bits));
  const __m256i high = _mm256_set1_epi32(static_cast<int32_t>(bits >> 8));
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(low, lane), lane)),
          _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(high, lane), lane))};
}
inline Lanes select(LaneMask mask, Lanes a, Lanes b) {
  return {_mm256_blendv_ps(b.low, a.low, mask.low), _mm256_blendv_ps(b.high, a.high, mask.high)};
}
inline __m256 scale_by_power(__m256 p, __m256 t) {
  const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
}
inline Lanes scale_by_power(Lanes p, Lanes t) {
  return {scale_by_power(p.low, t.low), scale_by_power(p.high, t.high)};
}

inline Pairs load_pairs(const uint16_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16))};
}
inline Pairs broadcast_pair(const uint16_t* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return {_mm256_set1_epi32(pair), _mm256_set1_epi32(pair)};
}
// The first n pairs, zeros after them.
inline Pairs load_pairs_first(const uint16_t* p, int n) {
  const LaneMask mask = first_lanes(n);
  const auto* const pairs = reinterpret_cast<const int*>(p);
  return {_mm256_maskload_epi32(pairs, _mm256_castps_si256(mask.low)),
          _mm256_maskload_epi32(pairs + 8, _mm256_castps_si256(mask.high))};
}
// A product of pairs is two FMAs: of the odd elements (part 0), then of the even ones.
inline constexpr int kPairParts = 2;
template <int kPart>
inline __m256 pair_part(__m256i pairs) {
  // Two shifts: a mask would take one of the 16 registers.
  const __m256i top = kPart == 0 ? _mm256_srli_epi32(pairs, 16) : pairs;
  return _mm256_castsi256_ps(_mm256_slli_epi32(top, 16));
}
template <int kPart>
inline Lanes pair_part(Pairs pairs) {
  return {pair_part<kPart>(pairs.low), pair_part<kPart>(pairs.high)};
}
inline Lanes odd_lanes(Pairs pairs) {
  return pair_part<0>(pairs);
}
inline Lanes even_lanes(Pairs pairs) {
  return pair_part<1>(pairs);
}

inline void end_part(Lanes&) {}  // its few sums leave registers for both parts

// f32_to_bf16() in each 32-bit lane.
inline __m256i round_to_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  const __m256i top = _mm256_srli_epi32(bits, 16);
  const __m256i tie = _mm256_add_epi32(_mm256_and_si256(top, _mm256_set1_epi32(1)),
                                       _mm256_set1_epi32(0x7fff));
  __m256i result = _mm256_srli_epi32(_mm256_add_epi32(bits, tie), 16);
  const __m256i is_subnormal = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x00800000), magnitude);
  result = _mm256_blendv_epi8(result, _mm256_and_si256(top, _mm256_set1_epi32(0x8000)),
                              is_subnormal);
  const __m256i is_not_number = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7f800000));
  return _mm256_blendv_epi8(result, _mm256_or_si256(top, _mm256_set1_epi32(0x40)), is_not_number);
}
inline void store_bf16(uint16_t* p, Lanes a) {
  const __m256i packed = _mm256_packus_epi32(round_to_bf16(a.low), round_to_bf16(a.high));
  // packus works within 128-bit halves: put its quarters back in order.
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0)));
}
inline void store_bf16_first(uint16_t* p, Lanes a, int n) {
  uint16_t all[16];
  store_bf16(all, a);
  for (int i = 0; i < n; ++i) p[i] = all[i];
}

inline float sum_lanes(Lanes a) {
  const __m256 eight = _mm256_add_ps(a.low, a.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_lanes(Lanes a) {
  const __m256 eight = _mm256_max_ps(a.low, a.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
