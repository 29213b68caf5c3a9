#include "kernels/profile/op_profile.h"

#include <algorithm>

namespace rollpack::kernels {

OpProfile& StepProfile::op(const std::string& name) {
  const auto found = std::ranges::find(ops, name, &OpProfile::name);
  if (found != ops.end()) return *found;
  ops.push_back({.name = name});
  return ops.back();
}

void StepProfile::add(const StepProfile& other) {
  num_steps += other.num_steps;
  program_s += other.program_s;
  for (const OpProfile& theirs : other.ops) {
    OpProfile& ours = op(theirs.name);
    ours.num_calls += theirs.num_calls;
    ours.num_rows += theirs.num_rows;
    ours.seconds += theirs.seconds;
    ours.flops += theirs.flops;
    ours.bytes += theirs.bytes;
  }
}

}  // namespace rollpack::kernels
