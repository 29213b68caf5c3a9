// What a rank measured over some steps; ranks' measurements add up.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "kernels/profile/op_profile.h"

namespace rollpack::rollout {

struct Measurement {
  // One entry a step: what it had to compute and to read at least.
  std::vector<float> step_flops;
  std::vector<float> step_bytes;
  double compute_s = 0;           // of all steps, the backend's part
  int64_t largest_step_rows = 0;  // pads included
  int64_t peak_pages = 0;         // KV pages in use at once
  // Tokens of samples: when each one's first came, on the node's steady clock, and the time between
  // one token and the next of the same sample.
  std::vector<double> first_token_times_s;
  std::vector<float> token_gaps_s;
  kernels::StepProfile profile;         // empty unless the replica profiles its ops
  std::map<std::string, double> stats;  // the worker's numbers, now

  // Peaks add up too: every rank has memory of its own.
  void add(const Measurement& other);
};

// The steady clock, whose zero is the same for all processes of a node.
double steady_seconds();

}  // namespace rollpack::rollout
