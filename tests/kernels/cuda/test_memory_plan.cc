// The memory plan, without a device.
#include "kernels/cuda/memory_plan.h"

#include <chrono>
#include <memory>
#include <utility>

#include "kernels/communicator/shared_memory_communicator.h"
#include "kernels/cuda/device_communicator.h"
#include "kernels/cuda/graph_buckets.h"
#include "tests/kernels/rig.h"

namespace rollpack::kernels::cuda {
namespace {

constexpr int64_t kGiB = int64_t{1} << 30;

// About 8 billion weights, 128 KiB of KV a token.
constexpr ModelShape kLarge = {
    .D = 4096, .H = 32, .G = 8, .K = 128, .F = 14336, .V = 128256, .L = 32};

DeviceMemoryPlan plan_of(int64_t kv_cache_bytes, int64_t total, int64_t free) {
  return plan_memory(kLarge, {.kv_cache_bytes = kv_cache_bytes}, estimated_weight_bytes(kLarge),
                     {.total_bytes = total, .free_bytes = free});
}

TEST(MemoryPlan, WeightsAndPagesAreCountedToTheByte) {
  EXPECT_EQ(kv_page_bytes(kLarge), int64_t{32} * 8 * 2 * 16 * 128 * 2);
  const int64_t layer = int64_t{4096} * (32 + 16) * 128 + 4096 * 4096 + int64_t{3} * 4096 * 14336;
  EXPECT_EQ(estimated_weight_bytes(kLarge),
            (int64_t{128256} * 4096 + 32 * layer) * 2 + 65 * 4096 * 4);
  ModelShape odd = kLarge;
  odd.K = 80;
  EXPECT_EQ(kv_row_stride(odd), 80);
  odd.K = 20;
  EXPECT_EQ(kv_row_stride(odd), 32);  // rows of whole products of 16
}

// Of all that grows with the model or its KV cache. Activations are whole, and logits of truncated
// samples.
TEST(MemoryPlan, RanksThatShareAModelHoldAPartEach) {
  const auto plan_for = [](std::shared_ptr<Communicator> communicator) {
    const BackendOptions options = {
        .kv_cache_bytes = 4 * kGiB, .enforce_eager = true, .communicator = std::move(communicator)};
    return plan_memory(kLarge, options, estimated_weight_bytes(kLarge, options.at()),
                       {.total_bytes = 80 * kGiB, .free_bytes = 80 * kGiB});
  };
  const DeviceMemoryPlan whole = plan_for(nullptr);
  for (const int32_t num_ranks : {2, 4, 8}) {
    int64_t weights = 0;
    for (auto& rank : make_thread_communicators(num_ranks, std::chrono::seconds(1), 4096)) {
      const DeviceMemoryPlan part = plan_for(std::move(rank));
      EXPECT_LT(static_cast<double>(part.weights),
                1.01 * static_cast<double>(whole.weights) / num_ranks);
      EXPECT_EQ(part.num_pages, whole.num_pages * num_ranks);  // in as many bytes
      EXPECT_LT(part.activations, whole.activations);
      EXPECT_LT(part.workspaces - kExchangeBytes - kNcclBytes, whole.workspaces);
      weights += part.weights;
    }
    // What all hold are the norms.
    EXPECT_EQ(weights, whole.weights + (num_ranks - 1) * int64_t{65} * 4096 * 4) << num_ranks;
  }
}

TEST(MemoryPlan, AnExplicitCacheWins) {
  const DeviceMemoryPlan plan = plan_of(10 * kGiB, 80 * kGiB, 79 * kGiB);
  EXPECT_EQ(plan.num_pages, 10 * kGiB / kv_page_bytes(kLarge));
  EXPECT_EQ(plan.kv_cache, plan.num_pages * kv_page_bytes(kLarge));
  EXPECT_EQ(plan.staging, plan.weights);
}

TEST(MemoryPlan, WithoutOneTheCacheTakesWhatIsLeft) {
  for (const int64_t total : {24, 40, 80, 192}) {
    const DeviceMemoryPlan plan = plan_of(0, total * kGiB, total * kGiB);
    const auto available =
        static_cast<int64_t>(static_cast<double>(total * kGiB) * kMemoryUtilisation);
    EXPECT_LE(plan.total(), available) << total;
    EXPECT_GT(plan.total(), available - kv_page_bytes(kLarge)) << total;
    // Staged weights may take half of what is left beside the weights in use.
    EXPECT_EQ(plan.staging > 0, total >= 80) << total;
  }
}

TEST(MemoryPlan, WhatOthersHoldIsNotPlannedWith) {
  const DeviceMemoryPlan plan = plan_of(0, 80 * kGiB, 30 * kGiB);
  EXPECT_LE(plan.total(), 30 * kGiB);
  EXPECT_EQ(plan.staging, 0);
}

TEST(MemoryPlan, GraphsHaveALineThatTheyMayNotExceed) {
  const DeviceMemoryPlan plan = plan_of(kGiB, 80 * kGiB, 80 * kGiB);
  EXPECT_EQ(plan.graphs, graph_bytes(kLarge, {}));
  EXPECT_GT(plan.graphs, 46 * 32 * 8 * int64_t{4096});  // 23 buckets, twice; 8 kernels a layer
  EXPECT_LT(plan.graphs, kGiB / 8);
  const DeviceMemoryPlan eager =
      plan_memory(kLarge, {.kv_cache_bytes = kGiB, .enforce_eager = true}, plan.weights,
                  {.total_bytes = 80 * kGiB, .free_bytes = 80 * kGiB});
  EXPECT_EQ(eager.graphs, 0);
  // Page tables of steps that are graphs have room of their own.
  EXPECT_EQ(plan.steps - eager.steps, 2 * 256 * (24576 / 16) * 4);
  EXPECT_EQ(plan.total() - eager.total(), plan.graphs + plan.steps - eager.steps);
}

TEST(MemoryPlan, TooLittleMemoryNamesWhatIsNeededAndThere) {
  const std::string text = testing::error_text([] { plan_of(40 * kGiB, 48 * kGiB, 48 * kGiB); });
  const DeviceMemoryPlan fitting = plan_of(40 * kGiB, 800 * kGiB, 800 * kGiB);
  EXPECT_NE(text.find(std::to_string(fitting.total() - fitting.staging)), std::string::npos)
      << text;
  EXPECT_NE(text.find("engine.kv_cache_memory"), std::string::npos) << text;
  EXPECT_NE(text.find("graphs " + std::to_string(fitting.graphs)), std::string::npos) << text;
  EXPECT_NE(text.find("or set engine.enforce_eager"), std::string::npos) << text;
}

}  // namespace
}  // namespace rollpack::kernels::cuda
