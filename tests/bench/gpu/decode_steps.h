// Whole steps that decode, through rollout's forward pass, as graphs and kernel by kernel: what a
// step costs besides its kernels, which ops alone do not show.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace rollpack::bench {

struct DecodeSizes {
  kernels::ModelShape model;    // with a tied head and no biases
  std::vector<int32_t> rows;    // sequences of a step, each with pages of its own
  int32_t context = 0;          // tokens before the first step
  int32_t num_steps = 0;        // that are timed, of each of five runs
  double bytes_per_second = 0;  // that the device reads at most; 0: no limit is known
};

// Prints a JSON object for each number of rows: microseconds a step both ways, medians of five runs
// that take turns, and their share of the time that reading the weights takes at least. Both ways
// must draw the same tokens with the same log-probabilities; on a backend without graphs they are
// one. Errors: internal naming the step where they do not; those of the backend.
void run_decode_steps(const std::string& backend, const DecodeSizes& sizes);

}  // namespace rollpack::bench
