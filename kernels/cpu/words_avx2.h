// Blocks of 16 x 16 words of 4 bytes turned from rows into columns, eight by eight in AVX2
// registers. Included inside a namespace, after <immintrin.h>. The same bits as words_portable.h.

// 16 bf16 with subnormals as zeros of their sign and NaN quiet, as rounding from f32 has it.
inline __m256i settle_bf16(__m256i x) {
  const __m256i infinity = _mm256_set1_epi16(0x7f80);
  const __m256i magnitude = _mm256_and_si256(x, _mm256_set1_epi16(0x7fff));
  const __m256i is_small =
      _mm256_cmpeq_epi16(_mm256_and_si256(x, infinity), _mm256_setzero_si256());
  const __m256i is_nan = _mm256_cmpgt_epi16(magnitude, infinity);
  const __m256i settled = _mm256_andnot_si256(_mm256_and_si256(is_small, magnitude), x);
  return _mm256_or_si256(settled, _mm256_and_si256(is_nan, _mm256_set1_epi16(0x40)));
}

template <bool kIsBf16>
inline __attribute__((always_inline)) void turn_eight(const std::byte* rows, int64_t row_bytes,
                                                      uint32_t* out, int64_t out_stride) {
  __m256i x[8], y[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    x[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + r * row_bytes));
    if (kIsBf16) x[r] = settle_bf16(x[r]);
  }
  // Pairs of rows, then fours, then halves of registers.
#pragma GCC unroll 4
  for (int r = 0; r < 8; r += 2) {
    y[r] = _mm256_unpacklo_epi32(x[r], x[r + 1]);
    y[r + 1] = _mm256_unpackhi_epi32(x[r], x[r + 1]);
  }
#pragma GCC unroll 2
  for (int r = 0; r < 8; r += 4) {
    x[r] = _mm256_unpacklo_epi64(y[r], y[r + 2]);
    x[r + 1] = _mm256_unpackhi_epi64(y[r], y[r + 2]);
    x[r + 2] = _mm256_unpacklo_epi64(y[r + 1], y[r + 3]);
    x[r + 3] = _mm256_unpackhi_epi64(y[r + 1], y[r + 3]);
  }
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) {
    const __m256i low = _mm256_permute2x128_si256(x[w], x[w + 4], 0x20);
    const __m256i high = _mm256_permute2x128_si256(x[w], x[w + 4], 0x31);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + w * out_stride), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (w + 4) * out_stride), high);
  }
}

// out[w * out_stride + r] = word w of row r; rows lie row_bytes apart. kIsBf16: settled on the way.
template <bool kIsBf16>
inline void turn_words(const std::byte* rows, int64_t row_bytes, uint32_t* out,
                       int64_t out_stride) {
  for (int w = 0; w < 16; w += 8) {
    for (int r = 0; r < 16; r += 8) {
      turn_eight<kIsBf16>(rows + r * row_bytes + w * 4, row_bytes, out + w * out_stride + r,
                          out_stride);
    }
  }
}
