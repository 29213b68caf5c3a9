// Philox4x32-10: a counter-based random generator. A draw is a pure function of (key, counter), so
// no state has to survive preemption, migration or a restart.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011;
// test vectors from Random123.
#pragma once

#include <array>
#include <cstdint>

namespace rollpack::kernels {

constexpr std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter,
                                             std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = 0xD2511F53ull * counter[0];
    const uint64_t product1 = 0xCD9E8D57ull * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0],
               static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1],
               static_cast<uint32_t>(product0)};
    key = {key[0] + 0x9E3779B9u, key[1] + 0xBB67AE85u};  // Weyl sequence: golden ratio, sqrt(3) - 1
  }
  return counter;
}

// The uniform number in [0, 1) that decides the token at `position` (absolute index of the sampled
// token in its sequence) of sample `sample_index` of the prompt whose id hashes to `prompt_hash`.
constexpr double sampling_uniform(uint64_t seed, uint64_t prompt_hash, uint32_t sample_index,
                                  uint32_t position) {
  const auto w = philox4x32({position, sample_index, static_cast<uint32_t>(prompt_hash),
                             static_cast<uint32_t>(prompt_hash >> 32)},
                            {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  const uint64_t bits = (static_cast<uint64_t>(w[0]) << 32 | w[1]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

}  // namespace rollpack::kernels
