// Ranks that hold other weights than they were sent: what each has packed and uses is compared, and
// who differs draws no sample.
#include <gtest/gtest.h>

#include <atomic>
#include <future>

#include "kernels/base/error.h"
#include "kernels/forwarding_backend.h"
#include "kernels/registry.h"
#include "tests/error_text.h"
#include "tests/rollout/cluster/thread_ranks.h"
#include "tests/rollout/cluster/weight_chunk.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;
using rollpack::testing::error_text;

enum class Lie { kNone, kPacksAnother, kKeepsTheOld };

// From the second set on it packs one number wrongly, or says that it has switched and has not.
class LyingBackend : public kernels::ForwardingBackend {
 public:
  LyingBackend(std::unique_ptr<kernels::Backend> inner, Lie lie)
      : ForwardingBackend(std::move(inner)), lie_(lie) {}

  void load_weight(kernels::WeightId id, int32_t part, const kernels::WeightSource& source,
                   kernels::ShardRange shard) override {
    if (!has_weights_ || lie_ != Lie::kPacksAnother || id != 3) {
      return inner().load_weight(id, part, source, shard);
    }
    std::vector<std::byte> scratch;
    const std::byte* rows = source.read_rows(0, source.rows, scratch);
    std::vector<std::byte> changed(rows, rows + source.rows * source.row_bytes());
    changed[3] ^= std::byte{0x80};  // the first number's sign
    inner().load_weight(
        id, part, kernels::TensorSource({changed.data(), source.dtype, {source.rows, source.cols}}),
        shard);
  }
  void commit_weights() override {
    if (has_weights_ && lie_ == Lie::kKeepsTheOld) return inner().discard_weights();
    inner().commit_weights();
    has_weights_ = true;
  }

 private:
  const Lie lie_;
  bool has_weights_ = false;
};

// Ranks of which one lies.
struct LyingRanks : ThreadRanks {
  LyingRanks(int num_ranks, int liar, Lie lie, bool recovers)
      : ThreadRanks(num_ranks,
                    [=](int rank) {
                      const Config config = long_config();
                      const ModelConfig model = tiny_model_config();
                      auto inner = kernels::make_backend(
                          "reference", model.shape(DType::kBF16),
                          {.kv_cache_bytes = config.engine.kv_cache_memory,
                           .max_num_seqs = config.engine.max_num_seqs,
                           .max_num_batched_tokens = config.engine.max_num_batched_tokens});
                      auto replica = std::make_unique<Replica>(
                          config, model,
                          std::make_unique<LyingBackend>(std::move(inner),
                                                         rank == liar ? lie : Lie::kNone));
                      load_tensors(*replica, tiny_tensors(1));
                      return replica;
                    },
                    {.is_on = recovers}) {}

  static Config long_config() {
    Config config = tiny_config();
    config.rollout.response_length = 60;
    config.rollout.ignore_eos = true;
    return config;
  }
  bridge::Outcome update() {
    const Chunk chunk(tiny_tensors(2));
    bridge::Outcome error = begin(dispatcher(), 5);
    if (!error) error = stage(dispatcher(), chunk);
    return error ? error : commit(dispatcher());
  }
  double stat(const std::string& name) const {
    for (const auto& [known, value] : const_cast<LyingRanks*>(this)->dispatcher().stats()) {
      if (known == name) return value;
    }
    return -1;
  }
};

uint64_t hash_of_tensors(uint32_t seed) {
  return tiny_replica(tiny_config(), seed)->backend().weights_hash();
}

TEST(WeightHashes, AnUpdateTellsWhatAllRanksUseAndHowLongTheyStoodStill) {
  LyingRanks ranks(3, -1, Lie::kNone, /*recovers=*/true);
  const bridge::WeightsInUse before = ranks.dispatcher().weights_in_use();
  EXPECT_EQ(before.version, 0);
  EXPECT_EQ(before.hash, hash_of_tensors(1));
  EXPECT_EQ(before.packing_ms + before.pause_ms, 0);
  ranks.dispatcher().submit(numbered_prompts(30));
  ASSERT_TRUE(ranks.sink.wait_for(1));
  ASSERT_FALSE(ranks.update());
  const bridge::WeightsInUse after = ranks.dispatcher().weights_in_use();
  EXPECT_EQ(after.version, 5);
  EXPECT_EQ(after.hash, hash_of_tensors(2));
  EXPECT_NE(after.hash, before.hash);
  EXPECT_GT(after.packing_ms, 0) << "ranks had samples to draw";
  EXPECT_GT(after.pause_ms, 0);
  ASSERT_TRUE(ranks.sink.wait_for(90));
  std::map<std::string, double> stats = ranks.stats();
  EXPECT_GT(stats.at("last_update_prefill_ms"), 0) << "live samples came back";
  EXPECT_EQ(ranks.stat("num_worker_deaths"), 0);
}

TEST(WeightHashes, AnIdleRankHasNothingToStandStillFor) {
  LyingRanks ranks(2, -1, Lie::kNone, /*recovers=*/true);
  ASSERT_FALSE(ranks.update());
  EXPECT_EQ(ranks.dispatcher().weights_in_use().packing_ms, 0);
  EXPECT_EQ(ranks.dispatcher().weights_in_use().pause_ms, 0);
}

// Every sample that carries the new version has the new weights' bits.
void expect_no_other_samples(KeepingSink& sink) {
  ThreadRanks truth(1, [](int) { return tiny_replica(LyingRanks::long_config(), 2); });
  truth.dispatcher().submit(numbered_prompts(30));
  ASSERT_TRUE(truth.sink.wait_for(90));
  const auto expected = truth.sink.samples();
  int num_new = 0;
  for (const auto& [name, sample] : sink.samples()) {
    if (sample.weight_versions.front().version != 5) continue;
    ++num_new;
    EXPECT_EQ(sample.response_ids, expected.at(name).response_ids);
    EXPECT_EQ(sample.logprobs, expected.at(name).logprobs);
  }
  EXPECT_GT(num_new, 0);
}

class OneLies : public ::testing::TestWithParam<std::tuple<int, Lie>> {};

TEST_P(OneLies, IsGivenUpAndTheOthersGoOn) {
  const auto [liar, lie] = GetParam();
  LyingRanks ranks(3, liar, lie, /*recovers=*/true);
  ranks.dispatcher().submit(numbered_prompts(30));
  ASSERT_TRUE(ranks.sink.wait_for(1));
  ASSERT_FALSE(ranks.update());
  EXPECT_EQ(ranks.stat("num_worker_deaths"), 1);
  EXPECT_EQ(ranks.stat("num_workers"), 2);
  EXPECT_EQ(ranks.dispatcher().weights_in_use().hash, hash_of_tensors(2));
  EXPECT_FALSE(ranks.dispatcher().health());
  ASSERT_TRUE(ranks.sink.wait_for(90));
  expect_no_other_samples(ranks.sink);
}

INSTANTIATE_TEST_SUITE_P(WeightHashes, OneLies,
                         ::testing::Combine(::testing::Values(0, 2),
                                            ::testing::Values(Lie::kPacksAnother,
                                                              Lie::kKeepsTheOld)));

TEST(WeightHashes, WithoutRecoveryALiarEndsTheJobAndIsNamed) {
  for (const Lie lie : {Lie::kPacksAnother, Lie::kKeepsTheOld}) {
    LyingRanks ranks(2, 1, lie, /*recovers=*/false);
    const bridge::Outcome error = ranks.update();
    ASSERT_TRUE(error);
    EXPECT_EQ(error->code, ErrorCode::kDataLoss);
    const bool is_old = lie == Lie::kKeepsTheOld;
    const std::string text = format_error(*error);
    EXPECT_EQ(text.rfind("rank 1 weights = hash ", 0), 0u) << text;
    EXPECT_EQ(
        text.find(fmt::format("hash {:016x}: expected", hash_of_tensors(1))) != std::string::npos,
        is_old)
        << text;
    EXPECT_NE(text.find(fmt::format("expected hash {:016x}, which the other ranks have for "
                                    "version 5; what it has packed is not what it was sent",
                                    hash_of_tensors(2))),
              std::string::npos)
        << text;
    EXPECT_EQ(ranks.dispatcher().health()->field, "rank 1 weights");
    EXPECT_EQ(ranks.dispatcher().weight_version(), 0);
  }
}

// Takes commands and never answers.
class SilentLink : public WorkerLink {
 public:
  void send(Command) override {}
  bool is_own_process() const override { return true; }
  int rank_on_node() const override { return 3; }
  void kill() override { ++num_kills; }
  std::atomic<int> num_kills = 0;
};

TEST(WeightHashes, AReplacementTakesPartOnlyWithTheCurrentWeights) {
  ThreadRanks ranks(1, tiny_config(), {.is_on = true});
  Dispatcher& dispatcher = ranks.dispatcher();
  const auto num_workers = [&] {
    for (const auto& [name, value] : dispatcher.stats()) {
      if (name == "num_workers") return value;
    }
    return -1.0;
  };
  const std::string fingerprint = dispatcher.info().fingerprint;
  // Its checkpoint has changed on disk since rank 0 read it.
  const auto other = std::make_shared<SilentLink>();
  const int32_t number = dispatcher.add_replacement(other);
  dispatcher.handle(number,
                    WorkerReady{.fingerprint = fingerprint, .weights_hash = hash_of_tensors(2)});
  EXPECT_EQ(num_workers(), 1);
  EXPECT_EQ(other->num_kills, 1);
  // One that has none at all.
  const auto empty = std::make_shared<SilentLink>();
  dispatcher.handle(dispatcher.add_replacement(empty), WorkerReady{.fingerprint = fingerprint});
  EXPECT_EQ(empty->num_kills, 1);
  const auto right = std::make_shared<SilentLink>();
  dispatcher.handle(dispatcher.add_replacement(right),
                    WorkerReady{.fingerprint = fingerprint, .weights_hash = hash_of_tensors(1)});
  EXPECT_EQ(num_workers(), 2);
  EXPECT_EQ(right->num_kills, 0);
  dispatcher.lose_worker(3, {.code = ErrorCode::kUnavailable, .field = "rank 3", .value = "gone"});
}

TEST(WeightHashes, WhoCannotCatchUpIsGivenUpAndReplacedAfterAFullUpdate) {
  ThreadRanks ranks(1, tiny_config(), {.is_on = true});
  Dispatcher& dispatcher = ranks.dispatcher();
  std::vector<int> started;  // in whose place on the node
  dispatcher.set_replace([&](int rank_on_node) { started.push_back(rank_on_node); });
  const auto slow = std::make_shared<SilentLink>();
  const int32_t number = dispatcher.add_replacement(slow);
  const std::vector<NamedTensor> tensors = tiny_tensors(2);
  const Chunk some({tensors.front()}), all(tensors);
  // One more than is kept comes over the checkpoint while it loads that.
  const auto num_updates = static_cast<int64_t>(KeptWeights::kMaxPartialUpdates) + 2;
  for (int64_t version = 1; version <= num_updates; ++version) {
    ASSERT_FALSE(begin(dispatcher, version, version - 1));
    ASSERT_FALSE(stage(dispatcher, some));
    ASSERT_FALSE(commit(dispatcher));
  }
  dispatcher.handle(number, WorkerReady{.fingerprint = dispatcher.info().fingerprint,
                                        .weights_hash = hash_of_tensors(1)});
  EXPECT_EQ(slow->num_kills, 1);
  EXPECT_TRUE(started.empty()) << "another could not catch up either";
  ASSERT_FALSE(begin(dispatcher, num_updates + 1));
  ASSERT_FALSE(stage(dispatcher, all));
  ASSERT_FALSE(commit(dispatcher));
  EXPECT_EQ(started, std::vector<int>{3});
  dispatcher.replacement_failed({.code = ErrorCode::kUnavailable, .field = "replacement"});
}

TEST(WeightHashes, RanksThatStartFromOtherWeightsDoNotStart) {
  EXPECT_EQ(error_text([] {
              ThreadRanks ranks(2, [](int rank) {
                return tiny_replica(tiny_config(), static_cast<uint32_t>(1 + rank));
              });
            }),
            fmt::format("data_loss: rank 1 weights = hash {:016x}: expected hash {:016x}, which "
                        "the other ranks have for version 0; what it has packed is not what it "
                        "was sent; it may not draw samples",
                        hash_of_tensors(2), hash_of_tensors(1)));
}

}  // namespace
}  // namespace rollpack::rollout
