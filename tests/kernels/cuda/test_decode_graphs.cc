// What the emulated device has on record of a backend's graphs: which kernels they have, which
// steps they are launched for, and what of the device's memory they leave alone.
#include "kernels/cuda/decode_graphs.h"

#include <cstring>
#include <map>
#include <numeric>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/emulation/emulated_device.h"
#include "kernels/cuda/graph_buckets.h"
#include "tests/kernels/decoding_steps.h"

namespace rollpack::kernels::cuda {
namespace {

using testing::add_sequence;
using testing::DecodingSteps;
using testing::expect_same_results;
using testing::page_range;
using testing::TinyModel;

// A tiny model over an emulated device of its own.
class Logged {
 public:
  explicit Logged(testing::RigOptions options = {}, EmulatedDeviceOptions device = {})
      : model_(std::string(testing::kEmulatedCuda), DType::kBF16,
               with_device(std::move(options), std::move(device))) {}

  TinyModel& model() { return model_; }
  Backend& backend() { return model_.rig().backend(); }
  const EmulatedDeviceLog& log() const { return *log_; }
  StepResult run(StepPlan plan) { return model_.run(std::move(plan)); }
  // Graphs that were launched for this step.
  int64_t launches_of(StepPlan plan) {
    const int64_t before = log_->num_graph_launches;
    run(std::move(plan));
    return log_->num_graph_launches - before;
  }
  // Where the memory lies that is in use under this name; null: there is none.
  const std::byte* place_of(const std::string& what) const {
    const auto found = log_->memory.find(what);
    return found == log_->memory.end() ? nullptr : found->second.data;
  }
  // All bytes that are allocated under this name.
  std::vector<std::byte> bytes_of(const std::string& what) const {
    std::vector<std::byte> bytes;
    const auto [begin, end] = log_->memory.equal_range(what);
    for (auto at = begin; at != end; ++at) {
      bytes.insert(bytes.end(), at->second.data, at->second.data + at->second.bytes);
    }
    EXPECT_FALSE(bytes.empty()) << what;
    return bytes;
  }

 private:
  testing::RigOptions with_device(testing::RigOptions options, EmulatedDeviceOptions device) {
    options.make = [this, device](const ModelShape& shape, const BackendOptions& given) mutable {
      log_ = device.log = std::make_shared<EmulatedDeviceLog>();
      return make_cuda_backend(make_emulated_device(device), shape, given);
    };
    return options;
  }

  std::shared_ptr<EmulatedDeviceLog> log_;
  TinyModel model_;
};

const ModelShape& tiny_shape(Logged& logged) {
  return logged.model().rig().shape();
}

StepPlan decoding(const std::vector<int32_t>& slots, int32_t position) {
  StepPlan plan;
  for (const int32_t slot : slots) {
    add_sequence(plan, {3}, position, page_range(2 * slot, 2), slot);
    plan.slot_inits.push_back(
        {.slot = slot, .next_position = position + 1, .end_position = position + 9});
    plan.samples.push_back({static_cast<int32_t>(plan.num_rows()) - 1, slot});
  }
  return plan;
}

// Kernels of each name in the layers of a graph, which lie between embedding and gathering.
std::map<std::string, int64_t> kernels_of_layers(const std::vector<std::string>& graph) {
  EXPECT_EQ(graph.front(), "embed");
  std::map<std::string, int64_t> counts;
  for (size_t i = 1; i < graph.size() && graph[i] != "gather_rows"; ++i) ++counts[graph[i]];
  return counts;
}

TEST(DecodeGraphs, HaveTheKernelsThatAreCountedForTheirRows) {
  Logged logged({.max_num_seqs = 40});
  logged.model().rig().commit();
  const std::vector<int32_t> buckets = graph_buckets(40);
  EXPECT_EQ(logged.backend().info().row_buckets, buckets);
  const ModelShape& shape = tiny_shape(logged);
  ASSERT_EQ(logged.log().graphs.size(), 2 * buckets.size());
  int64_t planned = 0;
  for (size_t i = 0; i < logged.log().graphs.size(); ++i) {
    const std::vector<std::string>& graph = logged.log().graphs[i];
    const int64_t rows = buckets[i / 2];
    EXPECT_EQ(static_cast<int64_t>(graph.size()), step_launches(shape, rows)) << rows;
    EXPECT_EQ(graph, logged.log().graphs[i / 2 * 2]) << "the other place";
    const auto counts = kernels_of_layers(graph);
    int64_t of_layers = 0;
    for (const auto& [name, count] : counts) of_layers += count;
    EXPECT_EQ(of_layers, shape.L * kLayerLaunches) << rows;
    EXPECT_EQ(counts.at("attention_chunks"), shape.L);
    EXPECT_EQ(counts.at("linear"), 4 * shape.L);
    planned += 4096 * static_cast<int64_t>(graph.size()) + 65536;
  }
  EXPECT_EQ(planned, graph_bytes(shape, {.max_num_seqs = 40}));
  EXPECT_NE(logged.backend().info().description.find("16 graphs of decoding steps, 1 to 40 rows"),
            std::string::npos)
      << logged.backend().info().description;
}

TEST(DecodeGraphs, AreLaunchedForStepsThatOnlyDecodeAndForNoOthers) {
  Logged logged({.max_num_seqs = 4, .max_num_batched_tokens = 40});
  const StepPlan step = decoding({0, 1, 2}, 5);
  EXPECT_EQ(logged.launches_of(step), 1);
  EXPECT_EQ(logged.launches_of(decoding({3}, 30)), 1);

  StepPlan plan = step;
  plan.scores = {{1, 7}};
  EXPECT_EQ(logged.launches_of(plan), 0) << "a score";
  plan = step;
  add_sequence(plan, {1, 2}, 0, {20});
  EXPECT_EQ(logged.launches_of(plan), 0) << "prefill";
  plan = {};
  add_sequence(plan, {1, 2}, 6, page_range(0, 1), 0);
  plan.samples = {{0, 0}, {1, 0}};
  EXPECT_EQ(logged.launches_of(plan), 0) << "a draft";

  // A page table that does not fit where graphs have theirs.
  plan = step;
  const StepResult want = logged.run(plan);
  plan.sequences[2].num_pages += 400'000;
  plan.page_tables.resize(plan.page_tables.size() + 400'000, 0);
  const int64_t before = logged.log().num_graph_launches;
  expect_same_results(logged.run(plan).samples, want.samples, "a large table");
  EXPECT_EQ(logged.log().num_graph_launches, before);
  EXPECT_EQ(logged.launches_of(step), 1);
}

TEST(DecodeGraphs, PositionsBehindTheRotationTableAreRefusedAsEver) {
  Logged logged({.max_num_seqs = 2, .max_num_batched_tokens = 4});
  StepPlan plan;
  add_sequence(plan, {3}, 512, std::vector<int32_t>(33, 1), 0);
  plan.slot_inits = {{.slot = 0, .next_position = 513, .end_position = 600}};
  plan.samples = {{0, 0}};
  const std::string text = testing::error_text([&] { logged.run(plan); });
  EXPECT_NE(text.find("plan.positions = 512: expected below 512"), std::string::npos) << text;
  EXPECT_EQ(logged.log().num_graph_launches, 0);
  EXPECT_EQ(logged.launches_of(decoding({0}, 5)), 1);
}

// Keys, values, slots and stop sets, to the byte, behind steps with skipped rows.
TEST(DecodeGraphs, SkippedRowsTouchNeitherPagesNorSlots) {
  testing::RigOptions options{.max_num_seqs = 16,
                              .max_num_batched_tokens = 16 * DecodingSteps::kPromptPages,
                              .num_pages = DecodingSteps::num_pages(16)};
  Logged with(options);
  options.enforce_eager = true;
  Logged without(options);
  for (Logged* logged : {&with, &without}) {
    logged->run(DecodingSteps::prefill(logged->model().V()));
  }
  for (const int32_t rows : {11, 5, 3}) {
    DecodingSteps steps(static_cast<uint64_t>(rows));
    std::vector<int32_t> slots(static_cast<size_t>(rows));
    std::iota(slots.begin(), slots.end(), 0);
    for (const StepPlan& plan : {steps.first(rows, with.model().V()), steps.next(slots)}) {
      with.model().poison();
      EXPECT_EQ(with.launches_of(plan), 1);
      EXPECT_EQ(without.launches_of(plan), 0);
      for (const char* what : {"engine.kv_cache_memory", "slots", "stop sets"}) {
        EXPECT_TRUE(with.bytes_of(what) == without.bytes_of(what)) << what << ", " << rows;
      }
    }
  }
}

TEST(DecodeGraphs, ThoseThatWouldTakeMoreThanPlannedAreNotKept) {
  // Planned are 4 KiB a kernel and 64 KiB a graph.
  Logged logged({.max_num_seqs = 8, .max_num_batched_tokens = 8}, {.graph_work_bytes = 12'000});
  const StepPlan one = decoding({0}, 5), many = decoding({0, 1, 2, 3, 4, 5, 6}, 5);
  const StepResult first = logged.run(one), second = logged.run(many);
  const BackendInfo& info = logged.backend().info();
  ASSERT_FALSE(info.row_buckets.empty());
  EXPECT_LT(info.row_buckets.back(), 8);
  EXPECT_NE(info.description.find("of 8 rows: more would take above"), std::string::npos)
      << info.description;
  EXPECT_EQ(logged.launches_of(one), 1);
  EXPECT_EQ(logged.launches_of(many), 0);
  Logged whole({.max_num_seqs = 8, .max_num_batched_tokens = 8});
  expect_same_results(whole.run(one).samples, first.samples, "one row");
  expect_same_results(whole.run(many).samples, second.samples, "seven rows");
}

TEST(DecodeGraphs, BelongToTheirProgram) {
  Logged logged({.max_num_seqs = 4, .max_num_batched_tokens = 8});
  EXPECT_EQ(logged.launches_of(decoding({0, 1}, 5)), 1);
  struct Nothing final : StepProgram {
    void run(Backend&, int64_t, int64_t) override { ++num_runs; }
    int num_runs = 0;
  };
  const auto nothing = std::make_shared<Nothing>();
  logged.backend().set_program(nothing);
  EXPECT_TRUE(logged.backend().info().row_buckets.empty());
  StepPlan plan;
  add_sequence(plan, {3}, 0, {1});
  EXPECT_EQ(logged.launches_of(plan), 0);
  EXPECT_EQ(nothing->num_runs, 1);
}

// New weights lie where the old ones did.
TEST(DecodeGraphs, ReadTheWeightsThatAreCommittedLast) {
  Logged logged({.max_num_seqs = 4, .max_num_batched_tokens = 8});
  const StepResult old = logged.run(decoding({0, 1}, 5));
  logged.model().set_weights(9);
  logged.model().rig().commit();
  const size_t captured = logged.log().graphs.size();
  const StepPlan plan = decoding({0, 1}, 5);
  const StepResult got = logged.run(plan);
  EXPECT_EQ(logged.log().graphs.size(), captured);
  Logged eager({.max_num_seqs = 4, .max_num_batched_tokens = 8, .enforce_eager = true});
  eager.model().set_weights(9);
  expect_same_results(got.samples, eager.run(plan).samples, "new weights");
  EXPECT_NE(got.samples[0].logprob, old.samples[0].logprob);
}

// Weights and pages come back to the addresses that graphs hold: none is captured again.
TEST(DecodeGraphs, StayAsTheyAreOverSleep) {
  testing::RigOptions options{.max_num_seqs = 4, .max_num_batched_tokens = 8};
  Logged sleeper(options), awake(options);
  options.enforce_eager = true;
  Logged eager(options);
  const StepPlan plan = decoding({0, 1, 2}, 5);
  EXPECT_EQ(sleeper.launches_of(plan), 1);
  const size_t captured = sleeper.log().graphs.size();
  const int64_t held = sleeper.backend().held_bytes();
  EXPECT_GT(held, eager.backend().held_bytes()) << "what graphs hold";
  const std::vector<std::string> names = {"weights", "engine.kv_cache_memory"};
  std::vector<const std::byte*> places;
  for (const std::string& name : names) places.push_back(sleeper.place_of(name));
  for (const int level : {1, 2}) {
    sleeper.backend().sleep(level);
    for (const std::string& name : names) EXPECT_EQ(sleeper.place_of(name), nullptr) << name;
    sleeper.backend().wake_up({.weights = true, .kv_cache = true});
    if (level == 2) {
      for (Logged* logged : {&sleeper, &awake, &eager}) {
        logged->model().set_weights(9);
        logged->model().rig().commit();
      }
    }
    for (size_t i = 0; i < names.size(); ++i) {
      EXPECT_EQ(sleeper.place_of(names[i]), places[i]) << names[i];
    }
    EXPECT_EQ(sleeper.backend().held_bytes(), held);
    const int64_t before = sleeper.log().num_graph_launches;
    const StepResult got = sleeper.run(plan);
    EXPECT_EQ(sleeper.log().num_graph_launches, before + 1);
    expect_same_results(got.samples, awake.run(plan).samples, "one that never slept");
    expect_same_results(got.samples, eager.run(plan).samples, "kernel by kernel");
  }
  EXPECT_EQ(sleeper.log().graphs.size(), captured);
}

}  // namespace
}  // namespace rollpack::kernels::cuda
