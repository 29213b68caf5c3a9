// Blocks of 16 x 16 words of 4 bytes turned from rows into columns in AVX-512 registers. Included
// inside a namespace, after <immintrin.h>. The same bits as words_portable.h.

// 32 bf16 with subnormals as zeros of their sign and NaN quiet, as rounding from f32 has it.
inline __m512i settle_bf16(__m512i x) {
  const __m512i infinity = _mm512_set1_epi16(0x7f80);
  const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi16(0x7fff));
  const __mmask32 is_small = _mm512_testn_epi16_mask(x, infinity);
  const __mmask32 is_nan = _mm512_cmpgt_epi16_mask(magnitude, infinity);
  const __m512i settled = _mm512_mask_sub_epi16(x, is_small, x, magnitude);
  const __m512i quiet = _mm512_or_si512(settled, _mm512_set1_epi16(0x40));
  return _mm512_mask_mov_epi16(settled, is_nan, quiet);
}

// out[w * out_stride + r] = word w of row r; rows lie row_bytes apart. kIsBf16: settled on the way.
template <bool kIsBf16>
inline void turn_words(const std::byte* rows, int64_t row_bytes, uint32_t* out,
                       int64_t out_stride) {
  __m512i x[16], y[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {
    x[r] = _mm512_loadu_si512(rows + r * row_bytes);
    if (kIsBf16) x[r] = settle_bf16(x[r]);
  }
  // Pairs of rows, then fours: quarter q of x[4 g + i] is words 4 q + i of rows 4 g, 4 g + 1, ...
#pragma GCC unroll 8
  for (int r = 0; r < 16; r += 2) {
    y[r] = _mm512_unpacklo_epi32(x[r], x[r + 1]);
    y[r + 1] = _mm512_unpackhi_epi32(x[r], x[r + 1]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 16; r += 4) {
    x[r] = _mm512_unpacklo_epi64(y[r], y[r + 2]);
    x[r + 1] = _mm512_unpackhi_epi64(y[r], y[r + 2]);
    x[r + 2] = _mm512_unpacklo_epi64(y[r + 1], y[r + 3]);
    x[r + 3] = _mm512_unpackhi_epi64(y[r + 1], y[r + 3]);
  }
  // Quarters of four registers, in two steps.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i even_low = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
    uint32_t* to = out + i * out_stride;
    _mm512_storeu_si512(to, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
    _mm512_storeu_si512(to + 4 * out_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_si512(to + 8 * out_stride, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
    _mm512_storeu_si512(to + 12 * out_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
  }
}
