// Staged weights on every backend: a shadow set that changes no bit until it is committed.
#include "kernels/base/error.h"
#include "tests/kernels/tiny_model.h"

namespace rollpack::kernels::testing {
namespace {

using Weights = BackendTest;

class ScoredModel {
 public:
  ScoredModel(const std::string& backend, DType dtype) : model_(backend, dtype) {}

  std::vector<HeadResult> scores() { return model_.run(plan()).scores; }
  StepPlan plan() const {
    const std::vector<int32_t> ids = Numbers(4).ids(21, model_.V());
    StepPlan plan;
    add_sequence(plan, {ids.begin(), ids.end() - 1}, 0, page_range(0, 2));
    score_all(plan, {ids.begin() + 1, ids.end()});
    return plan;
  }
  TinyModel& model() { return model_; }
  Backend& backend() { return model_.rig().backend(); }

 private:
  TinyModel model_;
};

TEST_P(Weights, StagedWeightsChangeNoBitUntilTheyAreCommitted) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    ScoredModel scored(GetParam(), dtype);
    const auto before = scored.scores();
    const uint64_t hash = scored.backend().weights_hash();
    scored.model().set_weights(1);
    scored.model().rig().stage();
    expect_same_results(scored.scores(), before, "staged");
    EXPECT_EQ(scored.backend().weights_hash(), hash);
    scored.backend().commit_weights();
    const auto after = scored.scores();
    EXPECT_NE(scored.backend().weights_hash(), hash);
    for (size_t i = 0; i < after.size(); ++i) EXPECT_NE(after[i].logprob, before[i].logprob) << i;
    scored.model().set_weights(0);
    scored.model().rig().commit();
    expect_same_results(scored.scores(), before, "the first weights again");
    EXPECT_EQ(scored.backend().weights_hash(), hash);
  }
}

TEST_P(Weights, ANewModelOfTheSameWeightsGivesTheSameBitsAndHash) {
  ScoredModel updated(GetParam(), DType::kBF16);
  updated.scores();
  updated.model().set_weights(1);
  updated.model().rig().commit();
  ScoredModel fresh(GetParam(), DType::kBF16);
  fresh.model().set_weights(1);
  expect_same_results(updated.scores(), fresh.scores(), "updated and fresh");
  EXPECT_EQ(updated.backend().weights_hash(), fresh.backend().weights_hash());
}

TEST_P(Weights, DiscardedWeightsAreForgotten) {
  ScoredModel scored(GetParam(), DType::kBF16);
  const auto before = scored.scores();
  const uint64_t hash = scored.backend().weights_hash();
  scored.model().set_weights(1);
  scored.model().rig().stage();
  scored.backend().discard_weights();
  expect_same_results(scored.scores(), before, "discarded");
  EXPECT_EQ(scored.backend().weights_hash(), hash);
  scored.backend().begin_staging();  // an empty set, not the discarded one
  EXPECT_NE(error_text([&] { scored.backend().commit_weights(); }).find("w0 part 0"),
            std::string::npos);
  expect_same_results(scored.scores(), before, "after a refused commit");
}

TEST_P(Weights, ACommitTakesEffectBehindTheStepsSubmittedBefore) {
  ScoredModel scored(GetParam(), DType::kBF16);
  const auto before = scored.scores();
  scored.model().set_weights(1);
  scored.model().rig().stage();
  const StepHandle handle = scored.backend().submit(scored.plan());
  scored.backend().commit_weights();
  expect_same_results(scored.backend().wait(handle, soon()).scores, before, "submitted before");
  EXPECT_NE(scored.scores()[0].logprob, before[0].logprob);
}

// Three weights, one of two parts.
class WeightErrors : public BackendTest {
 protected:
  void SetUp() override {
    backend().declare_weight(
        {.name = "norm", .kind = WeightKind::kVector, .part_rows = {8}, .cols = 1});
    backend().declare_weight({.name = "qkv", .part_rows = {4, 2}, .cols = 8});
  }

  Backend& backend() { return *backend_; }
  void load(WeightId id, int32_t part, int64_t rows, int64_t cols, DType dtype = DType::kF32) {
    const std::vector<double> zeros(64, 0.0);
    backend().load_weight(id, part, {zeros.data(), dtype, {rows, cols}}, {0, rows});
  }
  // Fails unless `call` throws `code` with all of `words` in its text.
  void expect_error(ErrorCode code, const std::vector<std::string>& words,
                    const std::function<void()>& call) {
    try {
      call();
      ADD_FAILURE() << "no error; expected " << error_code_name(code);
    } catch (const Error& error) {
      EXPECT_EQ(error_code_name(error.info.code), error_code_name(code)) << error.what();
      for (const std::string& word : words) {
        EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << error.what();
      }
    }
  }

  std::unique_ptr<Backend> backend_ =
      make_tested_backend(GetParam(), small_shape(DType::kBF16), {.kv_cache_bytes = 1 << 20});
};

TEST_P(WeightErrors, AMissingPartIsNamedAndMayStillBeLoaded) {
  backend().begin_staging();
  load(0, 0, 8, 1);
  load(1, 0, 4, 8);
  expect_error(ErrorCode::kFailedPrecondition, {"qkv part 1", "not loaded"},
               [&] { backend().commit_weights(); });
  load(1, 1, 2, 8);
  backend().commit_weights();
}

TEST_P(WeightErrors, AWrongShapeNamesWeightPartAndBothShapes) {
  backend().begin_staging();
  expect_error(ErrorCode::kInvalidArgument, {"qkv part 1", "[4, 8]", "[2, 8]"},
               [&] { load(1, 1, 4, 8); });
  expect_error(ErrorCode::kInvalidArgument, {"norm part 0", "[7, 1]", "8"},
               [&] { load(0, 0, 7, 1); });
}

TEST_P(WeightErrors, AnIntegerSourceIsRefused) {
  backend().begin_staging();
  expect_error(ErrorCode::kInvalidArgument, {"qkv", "dtype", "int32", "float32, bfloat16"},
               [&] { load(1, 0, 4, 8, DType::kI32); });
}

TEST_P(WeightErrors, UnknownIdsAndPartsAreRefused) {
  backend().begin_staging();
  expect_error(ErrorCode::kInvalidArgument, {"weight", "2"}, [&] { load(2, 0, 4, 8); });
  expect_error(ErrorCode::kInvalidArgument, {"weight", "-1"}, [&] { load(-1, 0, 4, 8); });
  expect_error(ErrorCode::kInvalidArgument, {"qkv part", "2"}, [&] { load(1, 2, 4, 8); });
}

TEST_P(WeightErrors, CallsInTheWrongStateAreRefused) {
  const auto code = ErrorCode::kFailedPrecondition;
  expect_error(code, {"begin_staging"}, [&] { load(0, 0, 8, 1); });
  expect_error(code, {"begin_staging"}, [&] { backend().commit_weights(); });
  expect_error(code, {"weights"}, [&] { backend().weights_hash(); });
  backend().discard_weights();  // nothing staged, nothing to do
  backend().begin_staging();
  expect_error(code, {"commit or discard"}, [&] { backend().begin_staging(); });
  expect_error(code, {"committed"}, [&] { backend().copy_committed_to_staged(); });
  expect_error(code, {"late", "declare"},
               [&] { backend().declare_weight({.name = "late", .part_rows = {4}, .cols = 8}); });
}

TEST_P(WeightErrors, ACopyOfTheCommittedSetTakesUpdatesOfSomeParts) {
  backend().begin_staging();
  load(0, 0, 8, 1);
  load(1, 0, 4, 8);
  load(1, 1, 2, 8);
  backend().commit_weights();
  const uint64_t hash = backend().weights_hash();
  backend().begin_staging();
  backend().copy_committed_to_staged();
  backend().commit_weights();
  EXPECT_EQ(backend().weights_hash(), hash);
  backend().begin_staging();
  backend().copy_committed_to_staged();
  const std::vector<float> ones(16, 1.0f);
  backend().load_weight(1, 1, {ones.data(), DType::kF32, {2, 8}}, {0, 2});
  backend().commit_weights();
  EXPECT_NE(backend().weights_hash(), hash);
}

TEST_P(WeightErrors, TheStagedSetsHashIsThatOfTheCommittedOneItBecomes) {
  const ErrorCode code = ErrorCode::kFailedPrecondition;
  expect_error(code, {}, [&] { backend().staged_weights_hash(); });
  backend().begin_staging();
  load(0, 0, 8, 1);
  load(1, 0, 4, 8);
  expect_error(code, {"1"}, [&] { backend().staged_weights_hash(); });  // w1 part 1 is missing
  load(1, 1, 2, 8);
  const uint64_t first = backend().staged_weights_hash();
  const std::vector<float> ones(16, 1.0f);
  backend().load_weight(1, 1, {ones.data(), DType::kF32, {2, 8}}, {0, 2});
  const uint64_t second = backend().staged_weights_hash();
  EXPECT_NE(second, first) << "a part came anew";
  backend().commit_weights();
  EXPECT_EQ(backend().weights_hash(), second);
  backend().begin_staging();
  backend().copy_committed_to_staged();
  EXPECT_EQ(backend().staged_weights_hash(), second);
  load(1, 1, 2, 8);
  backend().commit_weights();
  EXPECT_EQ(backend().weights_hash(), first) << "hashed after the commit";
}

// bf16 1.5, 2.0 are the same numbers in every source dtype.
TEST_P(WeightErrors, SourcesOfEveryFloatDtypePackAlike) {
  std::vector<uint64_t> hashes;
  const std::vector<float> f32(32, 1.5f);
  const std::vector<uint16_t> bf16(32, 0x3fc0), f16(32, 0x3e00);
  const std::vector<ConstTensor> sources = {{f32.data(), DType::kF32, {4, 8}},
                                            {bf16.data(), DType::kBF16, {4, 8}},
                                            {f16.data(), DType::kF16, {4, 8}}};
  for (const ConstTensor& source : sources) {
    backend().begin_staging();
    load(0, 0, 8, 1);
    load(1, 1, 2, 8);
    backend().load_weight(1, 0, source, {0, 4});
    backend().commit_weights();
    hashes.push_back(backend().weights_hash());
  }
  EXPECT_EQ(hashes[0], hashes[1]);
  EXPECT_EQ(hashes[0], hashes[2]);
}

INSTANTIATE_TEST_SUITE_P(Backends, Weights, all_backends());
INSTANTIATE_TEST_SUITE_P(Backends, WeightErrors, all_backends());

}  // namespace
}  // namespace rollpack::kernels::testing
