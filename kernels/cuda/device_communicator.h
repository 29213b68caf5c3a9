// What ranks that hold one model together exchange while each computes on a device: the calls of
// Communicator over device memory, enqueued on the stream of the steps.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "kernels/communicator/communicator.h"

namespace rollpack::kernels::cuda {

// Of device memory, that what is gathered may pass through.
inline constexpr int64_t kExchangeBytes = int64_t{32} << 20;
// What NCCL may take for itself, which it does not say before: 10 MiB for each of up to 32 channels
// and its kernels' code and stacks come to hundreds of MiB.
inline constexpr int64_t kNcclBytes = int64_t{768} << 20;

class DeviceCommunicator : public Communicator {
 public:
  // "through host memory", for the start-up line. No bit depends on it.
  virtual std::string description() const = 0;
  // Looks after calls that are enqueued, the oldest of which cannot have begun before `since`;
  // never waits for them. Errors: as of a call, once they can no longer end.
  virtual void check(std::chrono::steady_clock::time_point since) = 0;
  // Of exchanges that have ended on the device. Errors: as of a call, where some may have ended
  // because a rank broke off; what they left behind counts for nothing then.
  virtual void require_unbroken() = 0;
};

}  // namespace rollpack::kernels::cuda
