// A model held by several ranks that are backends of one process: the same plans go to all of them.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <memory>
#include <string_view>
#include <vector>

#include "kernels/communicator/shared_memory_communicator.h"
#include "tests/kernels/rig.h"
#include "tests/rollout/tiny_model.h"

namespace rollpack::rollout {

// The emulated backend whose ranks exchange by what stands in for NCCL.
inline constexpr std::string_view kEmulatedNccl = "cuda_emulated_nccl";

class ShardedReplica {
 public:
  // config.engine.backend: one of kernels::testing::tested_backends(), or kEmulatedNccl.
  ShardedReplica(const Config& config, const ModelConfig& model, int32_t num_ranks)
      : ranks_(static_cast<size_t>(num_ranks)) {
    const bool by_nccl = config.engine.backend == kEmulatedNccl && num_ranks > 1;
    const auto link = by_nccl ? kernels::testing::make_fake_link() : std::vector<std::byte>();
    auto communicators =
        kernels::make_thread_communicators(num_ranks, std::chrono::seconds(60), 4096);
    std::vector<std::future<void>> made;  // by all ranks at once, as processes do
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
      made.push_back(std::async(std::launch::async, [&, rank] {
        ranks_[rank] = make_rank(config, model, std::move(communicators[rank]), link);
      }));
    }
    for (std::future<void>& rank : made) rank.wait();
    for (std::future<void>& rank : made) rank.get();
  }

  Replica& rank(size_t index) { return *ranks_[index]; }
  size_t num_ranks() const { return ranks_.size(); }

  void load(const std::vector<NamedTensor>& tensors) {
    for (auto& rank : ranks_) load_tensors(*rank, tensors);
  }

  // Results of all ranks, which compute beside each other.
  std::vector<kernels::StepResult> run(const kernels::StepPlan& plan) {
    std::vector<kernels::StepHandle> handles;
    for (auto& rank : ranks_) handles.push_back(rank->backend().submit(plan));
    std::vector<kernels::StepResult> results;
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::minutes(1);
    for (size_t r = 0; r < ranks_.size(); ++r) {
      results.push_back(ranks_[r]->backend().wait(handles[r], deadline));
    }
    return results;
  }

 private:
  static std::unique_ptr<Replica> make_rank(const Config& config, const ModelConfig& model,
                                            std::shared_ptr<kernels::Communicator> communicator,
                                            const std::vector<std::byte>& link) {
    if (communicator->size() == 1) communicator = nullptr;
    const EngineSection& engine = config.engine;
    const DType dtype = config.model.dtype == "float32" ? DType::kF32 : DType::kBF16;
    auto backend = kernels::testing::make_tested_backend(
        engine.backend == kEmulatedNccl ? kernels::testing::kEmulatedCuda : engine.backend,
        model.shape(dtype),
        {.num_threads = 1,
         .kv_cache_bytes = engine.kv_cache_memory,
         .max_num_seqs = engine.max_num_seqs,
         .max_num_batched_tokens = engine.max_num_batched_tokens,
         .communicator = communicator,
         .device_link = link});
    return std::make_unique<Replica>(config, model, std::move(backend), communicator);
  }

  std::vector<std::unique_ptr<Replica>> ranks_;
};

}  // namespace rollpack::rollout
