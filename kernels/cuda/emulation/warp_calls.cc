// What a warp does together, for all 32 lanes at once. Layouts of fragments: simt.h.
#include <cstring>

#include "kernels/base/dtype.h"
#include "kernels/cuda/simt.h"

namespace rollpack::kernels::cuda::emulation {
namespace {

float low_half(uint32_t pair) {
  return bf16_to_f32(static_cast<uint16_t>(pair & 0xffffu));
}
float high_half(uint32_t pair) {
  return bf16_to_f32(static_cast<uint16_t>(pair >> 16));
}

}  // namespace

void combine_sync(void* const*) {}

void combine_ballot(void* const* records) {
  unsigned bits = 0;
  for (uint32_t i = 0; i < kWarpLanes; ++i) {
    if (static_cast<BallotRecord*>(records[i])->holds) bits |= 1u << i;
  }
  for (uint32_t i = 0; i < kWarpLanes; ++i) static_cast<BallotRecord*>(records[i])->result = bits;
}

// k ascending, one rounding a product: bf16 products are exact in f32, so a multiplication and an
// addition are a fused one. Hardware sums otherwise, in an order it does not tell.
void combine_mma(void* const* records) {
  float a[16][16], b[16][8], acc[16][8];
  for (uint32_t lane = 0; lane < kWarpLanes; ++lane) {
    const auto& record = *static_cast<MmaRecord*>(records[lane]);
    const uint32_t g = lane / 4, t = lane % 4 * 2;
    for (uint32_t i = 0; i < 4; ++i) {
      a[g + i % 2 * 8][t + i / 2 * 8] = low_half(record.a[i]);
      a[g + i % 2 * 8][t + i / 2 * 8 + 1] = high_half(record.a[i]);
      acc[g + i / 2 * 8][t + i % 2] = record.acc[i];
    }
    for (uint32_t i = 0; i < 2; ++i) {
      b[t + i * 8][g] = low_half(record.b[i]);
      b[t + i * 8 + 1][g] = high_half(record.b[i]);
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) acc[m][n] += a[m][k] * b[k][n];
    }
  }
  for (uint32_t lane = 0; lane < kWarpLanes; ++lane) {
    const auto& record = *static_cast<MmaRecord*>(records[lane]);
    const uint32_t g = lane / 4, t = lane % 4 * 2;
    for (uint32_t i = 0; i < 4; ++i) record.acc[i] = acc[g + i / 2 * 8][t + i % 2];
  }
}

void combine_ldmatrix(void* const* records) {
  for (uint32_t lane = 0; lane < kWarpLanes; ++lane) {
    const auto& record = *static_cast<LdmatrixRecord*>(records[lane]);
    for (uint32_t i = 0; i < 4; ++i) {
      const void* const row = static_cast<LdmatrixRecord*>(records[i * 8 + lane / 4])->row;
      std::memcpy(&record.r[i], static_cast<const std::byte*>(row) + lane % 4 * 4, 4);
    }
  }
}

void combine_ldmatrix_trans(void* const* records) {
  for (uint32_t lane = 0; lane < kWarpLanes; ++lane) {
    const auto& record = *static_cast<LdmatrixRecord*>(records[lane]);
    for (uint32_t i = 0; i < 4; ++i) {
      uint16_t pair[2];
      for (uint32_t j = 0; j < 2; ++j) {
        const void* const row =
            static_cast<LdmatrixRecord*>(records[i * 8 + lane % 4 * 2 + j])->row;
        std::memcpy(&pair[j], static_cast<const std::byte*>(row) + lane / 4 * 2, 2);
      }
      record.r[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
}

}  // namespace rollpack::kernels::cuda::emulation
