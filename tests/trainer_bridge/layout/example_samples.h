// Deterministic samples with the edge cases that batches have gone wrong on: empty responses,
// one-token prompts, ids equal to the pad id in prompts, in responses and at their ends, groups
// that share a prompt, weight versions that change inside a response, text and integer ids.
#pragma once

#include <cstdint>
#include <vector>

#include "trainer_bridge/contract/sample.h"

namespace rollpack::bridge::testing {

inline constexpr int32_t kPadId = 2;  // also the EOS id

// `num` samples in groups of three, the same for the same arguments on every machine.
std::vector<Sample> example_samples(int32_t num, uint32_t seed, bool has_entropy);

// Each once, in order.
std::vector<const Sample*> pointers_to(const std::vector<Sample>& samples);

}  // namespace rollpack::bridge::testing
