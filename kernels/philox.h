// Philox4x32-10: a counter-based random generator. A draw is a pure function of (key, counter), so
// no state has to survive preemption, migration or a restart.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011;
// test vectors from Random123.
#pragma once

#include <array>
#include <cstdint>

#include "kernels/cuda/host_device.h"

namespace rollpack::kernels {

// Plain arrays, since std::array's operators are none of a device's functions.
struct PhiloxWords {
  uint32_t at[4];
};

ROLLPACK_HOST_DEVICE constexpr PhiloxWords philox4x32_words(PhiloxWords counter, uint32_t key0,
                                                            uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = 0xD2511F53ull * counter.at[0];
    const uint64_t product1 = 0xCD9E8D57ull * counter.at[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.at[1] ^ key0,
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.at[3] ^ key1,
                static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u;  // Weyl sequence: golden ratio, sqrt(3) - 1
    key1 += 0xBB67AE85u;
  }
  return counter;
}

constexpr std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter,
                                             std::array<uint32_t, 2> key) {
  const PhiloxWords words =
      philox4x32_words({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return {words.at[0], words.at[1], words.at[2], words.at[3]};
}

// The uniform number in [0, 1) that decides the token at `position` (absolute index of the sampled
// token in its sequence) of sample `sample_index` of the prompt whose id hashes to `prompt_hash`.
ROLLPACK_HOST_DEVICE constexpr double sampling_uniform(uint64_t seed, uint64_t prompt_hash,
                                                       uint32_t sample_index, uint32_t position) {
  const PhiloxWords w =
      philox4x32_words({{position, sample_index, static_cast<uint32_t>(prompt_hash),
                         static_cast<uint32_t>(prompt_hash >> 32)}},
                       static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  const uint64_t bits = (static_cast<uint64_t>(w.at[0]) << 32 | w.at[1]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

}  // namespace rollpack::kernels
