// Ranks of a replica that compute on devices and exchange through host memory: a call waits for
// the stream, copies what this rank gives to pinned memory, hands it to the communicator of the
// processes, and enqueues the copy of what all gave. Any number of ranks may share a device, and no
// library is needed. But the host takes part in every call, so no graph can hold one, and a step
// is enqueued as fast as it is computed.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <string>

#include "kernels/cuda/device.h"
#include "kernels/cuda/device_communicator.h"

namespace rollpack::kernels::cuda {

// Values are device memory. Used by the thread that enqueues on `stream`.
class StagedCommunicator final : public DeviceCommunicator {
 public:
  // `reason`: why there is no better way, for the start-up line.
  StagedCommunicator(Device& device, Stream stream, std::shared_ptr<Communicator> host,
                     std::string reason = "");

  ReplicaRank at() const override { return host_->at(); }
  std::string description() const override {
    return "through host memory" + (reason_.empty() ? "" : " (" + reason_ + ")");
  }
  std::chrono::milliseconds timeout() const override { return host_->timeout(); }
  int32_t find_lost_rank() const override { return host_->find_lost_rank(); }
  // Calls have ended when they return.
  void check(std::chrono::steady_clock::time_point) override {}
  void require_unbroken() override {}
  void gather_columns(const GatherColumnsArgs& args) override;
  void broadcast(std::span<std::byte> values, int32_t root) override;
  void barrier() override { host_->barrier(); }
  void abandon() override { host_->abandon(); }
  double seconds() const override { return seconds_.load(std::memory_order_relaxed); }
  void reduce(const AllReduceArgs& args) override;

 private:
  class Exchange;

  std::byte* room_for(int64_t bytes);

  Device& device_;
  const Stream stream_;
  const std::shared_ptr<Communicator> host_;
  const std::string reason_;
  HostMemory bounce_;
  std::atomic<double> seconds_ = 0;
};

}  // namespace rollpack::kernels::cuda
