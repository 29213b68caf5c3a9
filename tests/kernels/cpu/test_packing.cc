// Packed panels of every instruction set against the layout of packing.h written out element by
// element, bit for bit, NaN and subnormals included.
#include "kernels/cpu/packing.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/cpu/thread_pool.h"
#include "toy_model.h"

namespace rollpack::kernels::cpu {
namespace {

using testing::Numbers;

// Rows of a checkpoint: any bits at all, one element off every alignment.
struct Rows {
  Rows(Numbers& numbers, DType dtype, int64_t rows, int64_t cols)
      : dtype(dtype), rows(rows), cols(cols), bytes((rows * cols + 1) * dtype_bytes(dtype)) {
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(numbers.next() & 0xff);
    // A quarter of the elements get an exponent of zeros or of ones.
    const auto width = static_cast<size_t>(dtype_bytes(dtype));
    for (size_t i = 0; i + width <= bytes.size(); i += 4 * width) {
      const bool is_small = numbers.below(2) == 0;
      std::byte& high = bytes[i + width - 1];
      std::byte& next = bytes[i + width - 2];
      high = is_small ? high & std::byte{0x80} : high | std::byte{0x7f};
      next = is_small ? next & std::byte{0x03} : next | std::byte{0x80};
    }
  }

  const std::byte* data() const { return bytes.data() + dtype_bytes(dtype); }
  TensorSource source() const { return TensorSource({data(), dtype, {rows, cols}}); }
  float at(int64_t row, int64_t col) const {
    const std::byte* element = data() + (row * cols + col) * dtype_bytes(dtype);
    if (dtype == DType::kF32) {
      float value;
      std::memcpy(&value, element, sizeof value);
      return value;
    }
    uint16_t half;
    std::memcpy(&half, element, sizeof half);
    return dtype == DType::kBF16 ? bf16_to_f32(half) : f16_to_f32(half);
  }

  DType dtype;
  int64_t rows, cols;
  std::vector<std::byte> bytes;
};

// Puts rows [begin, end) where packing.h says, one element at a time.
void place(const Rows& rows, int64_t begin, int64_t end, const PackedMatrix& matrix,
           const PackTarget& target) {
  const int64_t per_panel = matrix.columns_per_panel();
  for (int64_t row = begin; row < end; ++row) {
    const int64_t column = target.first_column + row - begin;
    const int64_t lane = target.lane_offset + column % per_panel;
    std::byte* panel = target.panels + column / per_panel * matrix.panel_bytes();
    for (int64_t k = 0; k < rows.cols; ++k) {
      const float value = rows.at(row, k);
      if (matrix.dtype == DType::kF32) {
        std::memcpy(panel + (k * 64 + lane) * 4, &value, sizeof value);
      } else {
        const uint16_t half = f32_to_bf16(value);
        std::memcpy(panel + ((k / 2 * 64 + lane) * 2 + k % 2) * 2, &half, sizeof half);
      }
    }
  }
}

struct Case {
  DType compute, source;
  int64_t num_rows, K_in;
  int64_t first_column = 0;
  bool is_gated = false;
};

// Packs all rows but the first, after `first_column` columns of others; gated: as gate and as up.
void expect_layout(const Case& c, Numbers& numbers, ThreadPool& pool) {
  const Rows rows(numbers, c.source, c.num_rows, c.K_in);
  const PackedMatrix matrix{.dtype = c.compute,
                            .columns = c.first_column + c.num_rows - 1,
                            .K_in = c.K_in,
                            .is_gated = c.is_gated};
  const auto pack = [&](auto&& into) {
    std::vector<std::byte> panels(static_cast<size_t>(matrix.bytes()));
    for (const int lane_offset : {0, 32}) {
      if (lane_offset != 0 && !c.is_gated) continue;
      into(PackTarget{panels.data(), c.first_column, lane_offset});
    }
    return panels;
  };
  const auto expected =
      pack([&](const PackTarget& target) { place(rows, 1, c.num_rows, matrix, target); });
  for (const Isa isa : supported_isas()) {
    for (ThreadPool* threads : {static_cast<ThreadPool*>(nullptr), &pool}) {
      const auto panels = pack([&](const PackTarget& target) {
        pack_rows(kernel_table(isa), rows.source(), 1, c.num_rows, matrix, target, threads);
      });
      ASSERT_TRUE(panels == expected)
          << isa_name(isa) << ", " << dtype_name(c.source) << " to " << dtype_name(c.compute)
          << ", " << c.num_rows - 1 << " rows of " << c.K_in << " from column " << c.first_column;
    }
  }
}

TEST(Packing, EveryInstructionSetWritesTheLayoutBitForBit) {
  Numbers numbers(7);
  ThreadPool pool(2);
  for (const DType compute : {DType::kBF16, DType::kF32}) {
    for (const DType source : {DType::kBF16, DType::kF32, DType::kF16}) {
      // 16 words of k and 16 rows make a block; 256 elements are converted at a time.
      for (const int64_t K_in : {1, 2, 15, 16, 17, 31, 32, 33, 64, 255, 257, 290}) {
        for (const int64_t num_rows : {2, 17, 18, 66, 145}) {
          expect_layout({compute, source, num_rows, K_in}, numbers, pool);
        }
        expect_layout({compute, source, 80, K_in, /*first_column=*/37}, numbers, pool);
        expect_layout({compute, source, 70, K_in, 0, /*is_gated=*/true}, numbers, pool);
      }
    }
  }
}

}  // namespace
}  // namespace rollpack::kernels::cpu
