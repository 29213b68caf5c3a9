// Blocks of 16 x 16 words of 4 bytes turned from rows into columns, word by word. Included inside a
// namespace.

// A pair of bf16 with subnormals as zeros of their sign and NaN quiet, as rounding from f32 has it.
inline uint32_t settle_bf16_pair(uint32_t pair) {
  uint32_t settled = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto bits = static_cast<uint16_t>(pair >> shift);
    settled |= static_cast<uint32_t>(f32_to_bf16(bf16_to_f32(bits))) << shift;
  }
  return settled;
}

// out[w * out_stride + r] = word w of row r; rows lie row_bytes apart. kIsBf16: settled on the way.
template <bool kIsBf16>
inline void turn_words(const std::byte* rows, int64_t row_bytes, uint32_t* out,
                       int64_t out_stride) {
  for (int r = 0; r < 16; ++r) {
    for (int w = 0; w < 16; ++w) {
      uint32_t word;
      __builtin_memcpy(&word, rows + r * row_bytes + w * 4, sizeof word);
      out[w * out_stride + r] = kIsBf16 ? settle_bf16_pair(word) : word;
    }
  }
}
