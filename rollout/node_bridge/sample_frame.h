// A sample as one frame on its way to the bridge of the node that asked for it: a small head, then
// its numbers as they lie in memory, so that neither end takes them apart. And the receipt that a
// rank of another node gets for it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "trainer_bridge/contract/sample.h"

namespace rollpack::rollout {

struct SampleFrame {
  int32_t worker = 0;   // who drew it
  int32_t attempt = 0;  // of its group
  bridge::Sample sample;
};

bool is_sample_frame(std::span<const uint8_t> body);
// Errors: resource_exhausted for a sample that no frame holds.
std::vector<uint8_t> encode_sample_frame(int32_t worker, int32_t attempt,
                                         const bridge::Sample& sample);
// The lists of a response's tokens lie in the frame, which they keep. Errors: data_loss.
SampleFrame decode_sample_frame(std::vector<uint8_t> body);

// The bridge has so many samples of this connection. Errors of decoding: data_loss.
std::vector<uint8_t> encode_receipt(uint64_t num_samples);
uint64_t decode_receipt(std::span<const uint8_t> body);

}  // namespace rollpack::rollout
