// philox4x32 against Random123's known answers, and the counter layout of sampling_uniform.
#include <gtest/gtest.h>

#include "kernels/philox.h"

namespace rollpack::kernels {
namespace {

using Block = std::array<uint32_t, 4>;

// Source: kat_vectors of Random123 1.14, lines "philox4x32 10".
TEST(Philox, GivesRandom123sKnownAnswers) {
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}),
            (Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}),
            (Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, UniformTakesTheUpperFiftyThreeBitsOfTheFirstTwoWords) {
  // All counters and keys zero: the first known answer above.
  const uint64_t bits = 0x6627e8d5e169c58dull >> 11;
  EXPECT_EQ(sampling_uniform(0, 0, 0, 0), static_cast<double>(bits) / 9007199254740992.0);
}

TEST(Philox, UniformReadsPositionSampleAndHashAsCounterAndSeedAsKey) {
  // The digits-of-pi vector, spelled as (position, sample_index, hash) and seed.
  const double u =
      sampling_uniform(0x299f31d0a4093822ull, 0x0370734413198a2eull, 0x85a308d3, 0x243f6a88);
  EXPECT_EQ(u, static_cast<double>(0xd16cfe0994fdccebull >> 11) / 9007199254740992.0);
}

TEST(Philox, UniformStaysBelowOne) {
  for (uint32_t position = 0; position < 100000; ++position) {
    const double u = sampling_uniform(7, 11, 3, position);
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
  }
}

}  // namespace
}  // namespace rollpack::kernels
