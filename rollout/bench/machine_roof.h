// What the machine can do at most, measured on both sides of a run.
#pragma once

#include "kernels/machine_limits.h"
#include "rollout/measurement/measurement.h"

namespace rollpack::rollout {

// Above this the machine was not the same before and after: repeat the run.
inline constexpr double kMaxLimitsDrift = 0.03;

struct MachineRoof {
  kernels::MachineLimits limits;  // the larger of both measurements, each
  double drift = 0;               // how far they lie apart at most, as a share of the larger

  // sum over steps of max(FLOP / peak, bytes / bandwidth), seconds.
  double least_seconds(const Measurement& measured) const;
  // FLOP and bytes of one piece of work, seconds.
  double least_seconds(double flops, double bytes) const;
};

MachineRoof combine(const kernels::MachineLimits& before, const kernels::MachineLimits& after);

}  // namespace rollpack::rollout
