// 16 f32 lanes as one AVX-512 register: what the paths with and without BF16 products share.
// Included inside a namespace, after <immintrin.h>, where the target pragma allows AVX-512 F, BW,
// VL and DQ, before the header of the path's products. The same bits as lanes_portable.h.

struct Lanes {
  __m512 x;
};
struct Pairs {
  __m512i x;
};
using LaneMask = __mmask16;

inline Lanes broadcast(float value) {
  return {_mm512_set1_ps(value)};
}
inline LaneMask first_lanes(int n) {
  return static_cast<LaneMask>(n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1u);
}
inline Lanes load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
inline Lanes load_first(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
}
inline void store(float* p, Lanes a) {
  _mm512_storeu_ps(p, a.x);
}
inline void store_first(float* p, Lanes a, int n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), a.x);
}
inline Lanes add(Lanes a, Lanes b) {
  return {_mm512_add_ps(a.x, b.x)};
}
inline Lanes sub(Lanes a, Lanes b) {
  return {_mm512_sub_ps(a.x, b.x)};
}
inline Lanes mul(Lanes a, Lanes b) {
  return {_mm512_mul_ps(a.x, b.x)};
}
inline Lanes div(Lanes a, Lanes b) {
  return {_mm512_div_ps(a.x, b.x)};
}
inline Lanes max(Lanes a, Lanes b) {
  return {_mm512_max_ps(a.x, b.x)};
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm512_fmadd_ps(a.x, b.x, c.x)};
}

inline LaneMask less(Lanes a, Lanes b) {
  return _mm512_cmp_ps_mask(a.x, b.x, _CMP_LT_OQ);
}
inline LaneMask is_nan(Lanes a) {
  return _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);
}
inline uint32_t bits_of(LaneMask mask) {
  return mask;
}
inline LaneMask lanes_of(uint32_t bits) {
  return static_cast<LaneMask>(bits);
}
inline Lanes select(LaneMask mask, Lanes a, Lanes b) {
  return {_mm512_mask_blend_ps(mask, b.x, a.x)};
}
inline Lanes scale_by_power(Lanes p, Lanes t) {
  const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(t.x), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p.x), power))};
}

inline Pairs load_pairs(const uint16_t* p) {
  return {_mm512_loadu_si512(p)};
}
inline Pairs broadcast_pair(const uint16_t* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return {_mm512_set1_epi32(pair)};
}
// The two elements of each pair.
inline Lanes odd_lanes(Pairs pairs) {
  const __m512i high_half = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_and_si512(pairs.x, high_half))};
}
inline Lanes even_lanes(Pairs pairs) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs.x, 16))};
}
inline float sum_lanes(Lanes a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.x), _mm512_extractf32x8_ps(a.x, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_lanes(Lanes a) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a.x), _mm512_extractf32x8_ps(a.x, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
