// Where the time of steps went, op by op.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace rollpack::kernels {

struct OpProfile {
  std::string name;  // "linear qkv", "attention", ..
  int64_t num_calls = 0;
  int64_t num_rows = 0;  // over all calls, pads included
  double seconds = 0;
  double flops = 0;  // multiply-adds count twice; pads included, as they are computed
  double bytes = 0;  // that must be read or written at least once a call
};

struct StepProfile {
  int64_t num_steps = 0;
  double program_s = 0;        // inside the forward pass: its ops and what lies between them
  std::vector<OpProfile> ops;  // in the order in which a step first calls them

  void add(const StepProfile& other);
  // The entry of `name`, made where it is missing.
  OpProfile& op(const std::string& name);
};

}  // namespace rollpack::kernels
