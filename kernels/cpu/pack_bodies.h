// The micro-kernel that packs rows of a checkpoint into columns of a panel; included like
// kernel_bodies.h, after it and the words header of the instruction set.

template <class Step>
void pack_columns(const std::byte* rows, int64_t row_bytes, int count, int64_t n,
                  typename Step::Element* panel) {
  constexpr bool kIsBf16 = Step::kWidth == 2;
  constexpr int64_t kBlock = 16 * Step::kWidth;  // elements of a row in 16 words
  constexpr auto kElementBytes = static_cast<int64_t>(sizeof(typename Step::Element));
  auto* out = reinterpret_cast<uint32_t*>(panel);
  int64_t k = 0;
  if (count == 16) {
    for (; k + kBlock <= n; k += kBlock, out += 16 * kPanelColumns) {
      turn_words<kIsBf16>(rows + k * kElementBytes, row_bytes, out, kPanelColumns);
    }
  }
  for (; k < n; k += kBlock, out += 16 * kPanelColumns) {
    const int64_t left = n - k < kBlock ? n - k : kBlock;
    uint32_t in[16][16] = {}, turned[16][16];
    for (int r = 0; r < count; ++r) {
      __builtin_memcpy(in[r], rows + r * row_bytes + k * kElementBytes,
                       static_cast<size_t>(left * kElementBytes));
    }
    turn_words<kIsBf16>(reinterpret_cast<const std::byte*>(in), sizeof in[0], turned[0], 16);
    for (int64_t w = 0; w * Step::kWidth < left; ++w) {
      __builtin_memcpy(out + w * kPanelColumns, turned[w], static_cast<size_t>(count) * 4);
    }
  }
}
