#include <gtest/gtest.h>

#include <limits>
#include <thread>
#include <vector>

#include "kernels/base/error.h"
#include "toy_model.h"

namespace rollpack::kernels::testing {
namespace {

const ModelShape kShape = {.D = 8, .H = 2, .G = 1, .K = 4, .F = 8, .V = 16, .L = 1};
const BackendOptions kOptions = {.num_threads = 2, .kv_cache_bytes = 1 << 20};

TEST(CpuBackend, InfoNamesInstructionSetThreadsAndBits) {
  for (const cpu::Isa isa : cpu::supported_isas()) {
    const auto backend = make_cpu_backend(kShape, kOptions, {.isa = isa, .widens_products = false});
    const BackendInfo& info = backend->info();
    EXPECT_EQ(info.name, "cpu");
    EXPECT_EQ(info.description, "cpu: " + std::string(cpu::isa_name(isa)) + ", 2 threads");
    EXPECT_EQ(info.fingerprint, "cpu-v1 bfloat16");
    EXPECT_EQ(info.kv.page_tokens, 16);
    // K: 2 pairs x 16 tokens x 4 bytes; V: 16 tokens x 16 columns (4 rounded up) x 2 bytes.
    EXPECT_EQ(info.kv.page_bytes, 128 + 512);
    EXPECT_EQ(info.kv.num_pages, (1 << 20) / 640);
    EXPECT_EQ(info.memory.kv_bytes, info.kv.page_bytes * info.kv.num_pages);
  }
}

TEST(CpuBackend, WhatItCannotRunIsAnErrorAtConstruction) {
  ModelShape shape = kShape;
  shape.K = 5;
  EXPECT_EQ(error_text([&] { make_cpu_backend(shape, kOptions); }),
            "head_dim = 5: expected an even number up to 512; rotation pairs elements k and "
            "k + head_dim / 2");
  shape = kShape;
  shape.dtype = DType::kF16;
  EXPECT_EQ(error_text([&] { make_cpu_backend(shape, kOptions); }),
            "model.dtype = float16: expected bfloat16 or float32");
  shape = kShape;
  shape.G = 3;
  EXPECT_EQ(error_text([&] { make_cpu_backend(shape, kOptions); }),
            "model shape = D 8 H 2 G 3 F 8 V 16 L 1: expected positive numbers, G dividing H");
  EXPECT_EQ(error_text([&] { make_cpu_backend(kShape, {.kv_cache_bytes = 639}); }),
            "engine.kv_cache_memory = 639 bytes: expected at least 640 bytes; one page holds 16 "
            "tokens of all 1 layers");
}

TEST(CpuBackend, StepsNeedAProgramAndWeights) {
  const auto backend = make_cpu_backend(kShape, kOptions);
  EXPECT_EQ(error_text([&] { backend->submit({}); }),
            "submit: no program is set; call set_program first");
  class Nothing final : public StepProgram {
    void run(Backend&, int64_t, int64_t) override {}
  };
  backend->set_program(std::make_shared<Nothing>());
  const StepHandle handle = backend->submit({});
  EXPECT_EQ(error_text([&] { backend->wait(handle, soon()); }),
            "step: no weights are committed yet");
}

TEST(CpuBackend, APlansMistakeIsTheStepsErrorAndTheNextStepRuns) {
  ToyModel model({});
  StepPlan good;
  add_rows(good, {1, 2, 3}, 0, {0});
  const auto text = [&](auto spoil) {
    StepPlan plan = good;
    spoil(plan);
    return error_text([&] { model.run(std::move(plan)); });
  };
  EXPECT_EQ(text([](StepPlan& p) { p.input_ids[1] = 1100; }),
            "step.rows[1].input_id = 1100: expected a number from 0 to 1099, or -1 where the slot "
            "has sampled a token");
  EXPECT_EQ(text([](StepPlan& p) { p.positions[2] = 5; }),
            "step.rows[2].position = 5: expected 2, one more than the row before");
  EXPECT_EQ(text([](StepPlan& p) {
              p.positions = {15, 16, 17};
            }),
            "step.rows[1].position = 16: expected a position within its 1 pages");
  EXPECT_EQ(text([](StepPlan& p) { p.page_tables[0] = 256; }),
            "step.page_tables[0].page = 256: expected a number from 0 to 255");
  EXPECT_EQ(text([](StepPlan& p) { p.samples = {{.row = 0, .slot = 4}}; }),
            "step.samples[0].slot = 4: expected a filled slot, all draws of a slot next to each "
            "other");
  EXPECT_EQ(text([](StepPlan& p) { p.scores = {{.row = 3, .token = 0}}; }),
            "step.scores[0].row = 3: expected a number from 0 to 2");
  EXPECT_EQ(text([](StepPlan& p) { p.sequences[0].num_rows = 2; }),
            "step.sequences[1].end = 2: expected 3, all rows");
  good.scores = {{.row = 2, .token = 7}};
  EXPECT_TRUE(model.run(good).scores[0].is_finite);
}

TEST(CpuBackend, ANonFiniteKeyFailsItsSequenceOnly) {
  ToyModel model({});
  StepPlan plan;
  add_rows(plan, {5, 6}, 0, {0});
  add_rows(plan, {5, 6}, 0, {1});
  plan.scores = {{.row = 1, .token = 3}, {.row = 3, .token = 3}};
  const auto good = model.run(plan);
  EXPECT_TRUE(good.failed_sequences.empty());
  // Token 7's embedding becomes infinite: so do the keys of its row.
  std::vector<float> embedding(1100 * 50, 0.25f);
  embedding[7 * 50] = std::numeric_limits<float>::infinity();
  model.backend().begin_staging();
  model.backend().copy_committed_to_staged();
  model.backend().load_weight(0, 0, {embedding.data(), DType::kF32, {1100, 50}}, {0, 1100});
  model.backend().commit_weights();
  plan.input_ids = {5, 7, 5, 6};
  plan.scores.clear();
  const auto bad = model.run(plan);
  EXPECT_EQ(bad.failed_sequences, std::vector<int32_t>{0});
}

TEST(CpuBackend, WeightsSwitchBetweenStepsAndStagingDisturbsNone) {
  ToyModel model({});
  StepPlan plan;
  const auto ids = random_ids(1, 40, 1100);
  add_rows(plan, ids, 0, page_range(0, 3));
  add_scores(plan, 0, ids, 39);
  const auto before = bits_of(model.run(plan).scores);
  const auto embedding = Numbers(99).vector(1100 * 50, 0.3f);
  for (int round = 0; round < 5; ++round) {
    const StepHandle first = model.backend().submit(plan);
    const StepHandle second = model.backend().submit(plan);
    model.backend().begin_staging();
    model.backend().copy_committed_to_staged();
    model.backend().load_weight(0, 0, {embedding.data(), DType::kF32, {1100, 50}}, {0, 1100});
    const bool is_committed = round == 4;
    if (is_committed) {
      model.backend().commit_weights();
    } else {
      model.backend().discard_weights();
    }
    EXPECT_EQ(bits_of(model.backend().wait(first, soon()).scores), before);
    EXPECT_EQ(bits_of(model.backend().wait(second, soon()).scores), before);
    if (is_committed) {
      EXPECT_NE(bits_of(model.run(plan).scores), before);
    }
  }
}

TEST(CpuBackend, TwoBackendsOfOneProcessRunAtOnce) {
  ToyModel first({}), second({});
  const auto ids = random_ids(2, 30, 1100);
  StepPlan plan;
  add_rows(plan, ids, 0, page_range(0, 2));
  add_scores(plan, 0, ids, 29);
  const auto want = bits_of(first.run(plan).scores);
  const auto repeat = [&](ToyModel& model) {
    for (int i = 0; i < 20; ++i) EXPECT_EQ(bits_of(model.run(plan).scores), want);
  };
  std::thread other([&] { repeat(second); });
  repeat(first);
  other.join();
}

}  // namespace
}  // namespace rollpack::kernels::testing
