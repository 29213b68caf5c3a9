// Products on the emulated device: a row has the same bits alone and among others, whichever tile
// it lies in, and whether slices of K are summed by one block or by one each.
#include <algorithm>
#include <memory>

#include "kernels/cuda/device.h"
#include "kernels/cuda/emulation/emulated_device.h"
#include "kernels/cuda/linear.h"
#include "tests/kernels/rig.h"

namespace rollpack::kernels::cuda {
namespace {

using testing::Numbers;

struct Product {
  int64_t N, K_in;
  Epilogue epilogue = Epilogue::kNone;
  DType dtype = DType::kBF16;
};

// A weight and bias of random numbers on an emulated device.
class LinearRig {
 public:
  explicit LinearRig(const Product& product) : product_(product) {
    const bool is_gated = product.epilogue == Epilogue::kGated;
    const int64_t per_piece = 16 / dtype_bytes(product.dtype);
    weight_ = {.N = product.N,
               .K_in = product.K_in,
               .row_stride = (product.K_in + per_piece - 1) / per_piece * per_piece,
               .is_gated = is_gated};
    const int64_t rows = packed_rows(weight_);
    std::vector<float> values = numbers_.vector(rows * weight_.row_stride);
    for (int64_t i = 0; i < rows * weight_.row_stride; ++i) {
      if (i % weight_.row_stride >= product.K_in) values[static_cast<size_t>(i)] = 0;
    }
    weight_memory_ = store(values);
    weight_.data = weight_memory_.as<>();
    const std::vector<float> bias = numbers_.vector(product.N * (is_gated ? 2 : 1));
    bias_ = copy(bias.data(), bias.size() * 4);
    workspace_ = DeviceMemory(*device_, kLinearWorkspaceBytes, "partial sums");
  }

  std::vector<float> rows(int64_t count) { return numbers_.vector(count * product_.K_in); }

  // Bits of the output of `rows`; the residual of every row is the same.
  std::vector<uint32_t> run(const std::vector<float>& rows) {
    const int64_t num_rows = static_cast<int64_t>(rows.size()) / product_.K_in;
    const DeviceMemory in = store(rows);
    const std::vector<float> residual(static_cast<size_t>(num_rows * product_.N), 0.75f);
    const DeviceMemory out = copy(residual.data(), residual.size() * 4);
    const int64_t weight_rows = product_.N * (weight_.is_gated ? 2 : 1);
    device_->kernels().linear({}, {.weight = weight_,
                                   .slices = slice_rule(weight_rows, product_.K_in),
                                   .epilogue = product_.epilogue,
                                   .dtype = product_.dtype,
                                   .num_rows = num_rows,
                                   .bias = bias_.as<float>(),
                                   .in = in.as<>(),
                                   .out = out.as<>(),
                                   .out_stride = product_.N,
                                   .workspace = workspace_.as<>()});
    std::vector<uint32_t> bits(residual.size());
    if (weight_.is_gated && product_.dtype == DType::kBF16) {
      std::copy_n(out.as<uint16_t>(), bits.size(), bits.begin());
    } else {
      std::copy_n(out.as<uint32_t>(), bits.size(), bits.begin());
    }
    return bits;
  }

 private:
  DeviceMemory copy(const void* source, size_t bytes) {
    DeviceMemory memory(*device_, static_cast<int64_t>(bytes), "a test");
    device_->copy_to_device({}, memory.as<>(), source, static_cast<int64_t>(bytes));
    return memory;
  }
  DeviceMemory store(const std::vector<float>& values) {
    if (product_.dtype == DType::kF32) return copy(values.data(), values.size() * 4);
    std::vector<uint16_t> bits;
    for (const float value : values) bits.push_back(f32_to_bf16(value));
    return copy(bits.data(), bits.size() * 2);
  }

  const Product product_;
  Numbers numbers_{17};
  std::unique_ptr<Device> device_ = make_emulated_device();
  DeviceMatrix weight_;
  DeviceMemory weight_memory_, bias_, workspace_;
};

std::vector<uint32_t> rows_of(const std::vector<uint32_t>& bits, int64_t begin, int64_t end,
                              int64_t N) {
  return {bits.begin() + begin * N, bits.begin() + end * N};
}

void expect_rows_alike(const Product& product, int64_t most, const std::vector<int64_t>& counts) {
  LinearRig rig(product);
  const std::vector<float> rows = rig.rows(most);
  const std::vector<uint32_t> want = rig.run(rows);
  const int64_t K = product.K_in;
  for (const int64_t count : counts) {
    // The last of them, so that a row also changes its place in a tile.
    const std::vector<float> some(rows.end() - count * K, rows.end());
    EXPECT_EQ(rig.run(some), rows_of(want, most - count, most, product.N))
        << count << " of " << most << " rows, N " << product.N << ", K " << K << ", "
        << dtype_name(product.dtype) << ", epilogue " << static_cast<int>(product.epilogue);
  }
}

TEST(CudaLinear, ARowAloneAndAmongOneToSeventyHasTheSameBits) {
  std::vector<int64_t> counts;
  for (int64_t count = 1; count < 70; ++count) counts.push_back(count);
  // 4 slices of K whose ends are not those of tiles.
  expect_rows_alike({.N = 70, .K_in = 312}, 70, counts);
  for (const Epilogue epilogue : {Epilogue::kNone, Epilogue::kGated, Epilogue::kResidual}) {
    for (const DType dtype : {DType::kBF16, DType::kF32}) {
      expect_rows_alike({.N = 36, .K_in = 150, .epilogue = epilogue, .dtype = dtype}, 70,
                        {1, 2, 7, 8, 9, 16, 31, 32, 33, 63, 64, 65});
    }
  }
}

// 64 tiles of columns: up to 64 rows each slice has its own blocks, beyond that one block adds
// both.
TEST(CudaLinear, SlicesAreSummedAlikeByOneBlockOrByOneEach) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    ASSERT_EQ(slice_rule(4096, 72).count, 2);
    expect_rows_alike({.N = 4096, .K_in = 72, .dtype = dtype}, 66, {1, 9, 33, 64, 65});
  }
}

// Barriers and waits that are missing show under some order of warps.
TEST(CudaLinear, NoOrderOfBlocksAndWarpsChangesABit) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    LinearRig rig({.N = 130, .K_in = 520, .dtype = dtype});
    const std::vector<float> rows = rig.rows(37);
    const std::vector<uint32_t> want = rig.run(rows);
    for (int repeat = 0; repeat < 8; ++repeat) EXPECT_EQ(rig.run(rows), want);
  }
}

}  // namespace
}  // namespace rollpack::kernels::cuda
