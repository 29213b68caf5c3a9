// bf16 products by two FMAs a pair and rounding by integer arithmetic, for AVX-512 without BF16.
// Included after lanes_avx512.h. The same bits as lanes_portable.h.

// 6 rows x 64 columns, as with BF16: all sums get the odd elements of a step before the even ones
// are unpacked, so 24 accumulators, 4 registers of weights, 1 input and a mask are 30 of 32.
inline constexpr int kRowsPerPass = 6;
inline constexpr int kVectorRegisters = 1;
constexpr int vectors_per_pass(int) { return 4; }

// The first n pairs, zeros after them.
inline Pairs load_pairs_first(const uint16_t* p, int n) {
  return {_mm512_maskz_loadu_epi32(first_lanes(n), p)};
}
// A product of pairs is two FMAs: of the odd elements (part 0), then of the even ones.
inline constexpr int kPairParts = 2;
template <int kPart>
inline Lanes pair_part(Pairs pairs) {
  return kPart == 0 ? odd_lanes(pairs) : even_lanes(pairs);
}

// Between the parts: the compiler would otherwise add both parts of one sum at once, for which
// inputs of both parts, and more registers than there are, would have to be ready.
inline void end_part(Lanes& sum) {
  asm volatile("" : "+v"(sum.x) : : "memory");
}

// f32_to_bf16() in each lane.
inline __m256i round_to_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __m512i top = _mm512_srli_epi32(bits, 16);
  const __m512i tie =
      _mm512_add_epi32(_mm512_and_si512(top, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
  __m512i result = _mm512_srli_epi32(_mm512_add_epi32(bits, tie), 16);
  const __mmask16 is_subnormal = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x00800000));
  result = _mm512_mask_and_epi32(result, is_subnormal, top, _mm512_set1_epi32(0x8000));
  const __mmask16 is_not_number = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
  result = _mm512_mask_or_epi32(result, is_not_number, top, _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(result);
}
inline void store_bf16(uint16_t* p, Lanes a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to_bf16(a.x));
}
inline void store_bf16_first(uint16_t* p, Lanes a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), round_to_bf16(a.x));
}
