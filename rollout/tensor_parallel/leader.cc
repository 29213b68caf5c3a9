#include "rollout/tensor_parallel/leader.h"

#include <utility>

#include "kernels/communicator/shared_memory_communicator.h"
#include "kernels/profile/profiled_backend.h"

namespace rollpack::rollout {

LeadingRank::LeadingRank(std::vector<bridge::OwnedFd> followers, std::chrono::milliseconds timeout,
                         bridge::Deadline deadline, std::vector<std::byte> device_link)
    : followers_(std::make_shared<FollowerLinks>(std::move(followers))),
      device_link_(std::move(device_link)) {
  ReplicaMemory memory = make_replica_memory(followers_->size());
  followers_->welcome(memory, device_link_, deadline);
  communicator_ = std::make_shared<kernels::SharedMemoryCommunicator>(
      std::move(memory.bytes),
      kernels::SharedMemoryOptions{
          .at = {.rank = 0, .size = followers_->size()},
          .timeout = timeout,
          .find_lost_rank = [links = followers_] { return links->find_lost_rank(); }});
}

std::unique_ptr<Replica> LeadingRank::make_replica(const Config& config, const ModelConfig& model,
                                                   ReplicaOptions options,
                                                   bridge::Deadline deadline) {
  options.communicator = communicator_;
  options.device_link = device_link_;
  const bool profiles = std::exchange(options.profiles, false);
  auto leader = std::make_unique<LeaderBackend>(configured_backend(config, model, options),
                                                followers_, deadline);
  backend_ = leader.get();
  std::unique_ptr<kernels::Backend> backend = std::move(leader);
  if (profiles) {
    const DType dtype = config.model.dtype == "float32" ? DType::kF32 : DType::kBF16;
    backend = std::make_unique<kernels::ProfiledBackend>(std::move(backend), model.shape(dtype));
  }
  return std::make_unique<Replica>(config, model, std::move(backend), communicator_);
}

}  // namespace rollpack::rollout
