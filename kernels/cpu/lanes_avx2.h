// 16 f32 lanes as two AVX2 registers. Included inside a namespace, after <immintrin.h>, where the
// target pragma allows AVX2 and FMA. Function by function the same bits as lanes_portable.h.

// 4 rows x 16 columns: 8 accumulators, 4 registers of weights (odd and even) and 2 of inputs of 16.
inline constexpr int kVectorsPerPass = 1;
inline constexpr int kRowsPerPass = 4;

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
inline __m256 odd_element(__m256i pair) {
  return _mm256_castsi256_ps(
      _mm256_and_si256(pair, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}
inline __m256 even_element(__m256i pair) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
}
inline __m256 fma_pairs(__m256 acc, __m256i a, __m256i b) {
  acc = _mm256_fmadd_ps(odd_element(a), odd_element(b), acc);
  return _mm256_fmadd_ps(even_element(a), even_element(b), acc);
}
inline Lanes fma_pairs(Lanes acc, Pairs a, Pairs b) {
  return {fma_pairs(acc.low, a.low, b.low), fma_pairs(acc.high, a.high, b.high)};
}

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
