// Ranks of a replica whose devices exchange by NCCL. Calls enqueue and return: the device waits for
// the others, not the host. Columns of uneven parts travel as an all_gather of padded parts through
// a workspace, from which a kernel moves them to their places.
//
// The communicator does not block, so that a rank that never comes is met by a deadline and not by
// a call that hangs: it is asked for its state while something is under way, and aborted once it
// has failed or is late. Who is missing NCCL does not say; then the ranks that are left meet in
// the communicator of their processes, which does.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/device.h"
#include "kernels/cuda/device_communicator.h"
#include "kernels/cuda/nccl_library.h"

namespace rollpack::kernels::cuda {

struct NcclOptions {
  std::shared_ptr<const NcclLibrary> library;
  NcclId id;  // one of the ranks has made it, all have the same
};

// Values are device memory. Used by the thread that enqueues on `stream`, abandon() too.
class NcclCommunicator final : public DeviceCommunicator {
 public:
  // Made by all ranks at once; returns when all have come. Deadlines are those of `host`.
  // Errors: unavailable naming who is missing, or what NCCL says.
  NcclCommunicator(Device& device, Stream stream, std::shared_ptr<Communicator> host,
                   NcclOptions options);
  ~NcclCommunicator() override;

  ReplicaRank at() const override { return host_->at(); }
  std::string description() const override;
  void gather_columns(const GatherColumnsArgs& args) override;
  void broadcast(std::span<std::byte> values, int32_t root) override;
  void barrier() override;
  void reduce(const AllReduceArgs& args) override;
  void abandon() override;
  double seconds() const override { return seconds_.load(std::memory_order_relaxed); }
  std::chrono::milliseconds timeout() const override { return host_->timeout(); }
  int32_t find_lost_rank() const override { return host_->find_lost_rank(); }
  void check(std::chrono::steady_clock::time_point since) override;
  void require_unbroken() override;

 private:
  template <class Call>
  void timed(const Call& call);
  void gather_parts(const GatherColumnsArgs& args, int64_t widest);
  // Waits until NCCL has taken a call. Errors: unavailable.
  void settle(NcclResult result, const char* call, std::chrono::milliseconds limit);
  void require_whole(const char* call) const;
  void abort();
  // Let the others know, then abort: their exchanges end when ours are broken off, with whatever
  // has come by then, and they must not take that for a result. Errors: unavailable; of what is
  // late, naming who is missing.
  [[noreturn]] void fail(const std::string& call, const std::string& reason);
  [[noreturn]] void fail_late(const std::string& call, std::chrono::milliseconds limit);
  [[noreturn]] void fail_lost(const std::string& call, int32_t lost);

  Device& device_;
  const Stream stream_;
  const std::shared_ptr<Communicator> host_;
  const NcclOptions options_;
  NcclComm* comm_ = nullptr;  // null: aborted
  // Of the call that is measured.
  OwnEvent begin_, end_;
  bool is_measuring_ = false;
  int64_t num_calls_ = 0;     // since the last that was measured
  int64_t num_measured_ = 0;  // for which the one being measured stands
  DeviceMemory workspace_;
  std::atomic<double> seconds_ = 0;
};

}  // namespace rollpack::kernels::cuda
