// bf16 products by VDPBF16PS and rounding by VCVTNEPS2BF16. Included after lanes_avx512.h, where
// the target pragma allows AVX-512 BF16. The same bits as lanes_portable.h.

// 6 rows x 64 columns: 24 accumulators, 4 registers of weights and 1 broadcast input of 32, and
// twice the 12 chains that hide VDPBF16PS's latency of 6 cycles at 2 a cycle.
inline constexpr int kRowsPerPass = 6;
inline constexpr int kVectorRegisters = 1;
constexpr int vectors_per_pass(int) { return 4; }

inline constexpr int kPairParts = 1;  // instructions that add a product of pairs to a sum
template <int kPart>
inline Pairs pair_part(Pairs pairs) {
  return pairs;
}
inline Lanes fma_pairs(Lanes acc, Pairs a, Pairs b) {
  return {_mm512_dpbf16_ps(acc.x, (__m512bh)a.x, (__m512bh)b.x)};
}
inline void store_bf16(uint16_t* p, Lanes a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.x));
}
inline void store_bf16_first(uint16_t* p, Lanes a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)_mm512_cvtneps_pbh(a.x));
}
