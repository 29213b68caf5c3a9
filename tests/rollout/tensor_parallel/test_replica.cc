// A leader and its followers, as threads: weights reach each by its share, steps give the bits of
// one rank, and whoever is missing ends the replica.
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <chrono>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "rollout/tensor_parallel/follower.h"
#include "rollout/tensor_parallel/leader.h"
#include "rollout/tensor_parallel/plan_codec.h"
#include "tests/rollout/cluster/thread_ranks.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;

Config cpu_config() {
  Config config = tiny_config();
  config.engine.backend = "cpu";
  config.model.dtype = "float32";
  return config;
}

bridge::Deadline soon() {
  return std::chrono::steady_clock::now() + 1min;
}

// The followers of a replica, each on a thread of its own.
class Followers {
 public:
  Followers(const Config& config, int32_t size, std::chrono::milliseconds timeout = 60s)
      : errors(static_cast<size_t>(size)), sockets_(static_cast<size_t>(size)) {
    for (int32_t rank = 1; rank < size; ++rank) {
      int ends[2];
      EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
      sockets_[static_cast<size_t>(rank)].reset(ends[0]);
      threads_.emplace_back([this, config, rank, size, timeout, end = ends[1]] {
        bridge::OwnedFd leader(end);
        try {
          ReplicaOptions options;
          options.communicator =
              join_replica(leader.get(), {rank, size}, timeout, soon()).communicator;
          follow(std::move(leader), config, tiny_model_config(), options);
        } catch (const Error& error) {
          errors[static_cast<size_t>(rank)] = error.what();
        }
      });
    }
    leading_.emplace(std::move(sockets_), timeout, soon());
  }
  ~Followers() { join(); }

  std::unique_ptr<Replica> make_leader(const Config& config) {
    return leading_->make_replica(config, tiny_model_config(), {}, soon());
  }
  // The leader's replica must be gone.
  void join() {
    leading_.reset();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

  std::vector<std::string> errors;  // by rank

 private:
  std::vector<bridge::OwnedFd> sockets_;
  std::optional<LeadingRank> leading_;
  std::vector<std::thread> threads_;
};

// Tokens and logprobs of 24 samples, some truncated, under weights that change on the way.
std::string generate(ThreadRanks& ranks) {
  std::vector<bridge::PromptRequest> prompts = numbered_prompts(8);
  prompts[1].sampling.top_k = 7;
  prompts[2].sampling.top_p = 0.8f;
  prompts[3].sampling.temperature = 0.0f;
  ranks.dispatcher().submit(std::move(prompts));
  EXPECT_TRUE(ranks.sink.wait_for(24));
  std::string text;
  for (const auto& [name, sample] : ranks.sink.take_samples()) {
    text += fmt::format("{}/{} {} ", name.first, name.second, sample.response_ids);
    text.append(reinterpret_cast<const char*>(sample.logprobs.data()),
                sample.logprobs.size() * sizeof(float));
  }
  return text;
}

std::string generate_alone(const Config& config, uint32_t seed) {
  ThreadRanks ranks(1, [&](int) { return tiny_replica(config, seed); });
  return generate(ranks);
}

class FollowedReplica : public ::testing::TestWithParam<int32_t> {};

TEST_P(FollowedReplica, GeneratesWhatOneRankDoes) {
  const Config config = cpu_config();
  const std::string wanted = generate_alone(config, 1);
  Followers followers(config, GetParam());
  {
    ThreadRanks ranks(1, [&](int) {
      std::unique_ptr<Replica> leader = followers.make_leader(config);
      load_tensors(*leader, tiny_tensors(1));
      return leader;
    });
    EXPECT_EQ(generate(ranks), wanted);
  }
  followers.join();
  for (const std::string& error : followers.errors) EXPECT_EQ(error, "");
}

INSTANTIATE_TEST_SUITE_P(Ranks, FollowedReplica, ::testing::Values(2, 3, 4));

TEST(TensorParallelReplica, TakesNewWeightsOnEveryRankAndHashesThem) {
  const Config config = cpu_config();
  Followers first_followers(config, 3), second_followers(config, 3);
  {
    const std::unique_ptr<Replica> first = first_followers.make_leader(config);
    const std::unique_ptr<Replica> second = second_followers.make_leader(config);
    load_tensors(*first, tiny_tensors(1));
    load_tensors(*second, tiny_tensors(2));
    kernels::Backend& backend = first->backend();
    const uint64_t before = backend.weights_hash();
    EXPECT_NE(before, second->backend().weights_hash());
    // Every tensor that a later rank holds counts: the last rows of a weight are the last rank's.
    std::vector<NamedTensor> tensors = tiny_tensors(1);
    for (NamedTensor& tensor : tensors) {
      if (tensor.name == "model.layers.1.mlp.down_proj.weight") tensor.values.back() += 1.0f;
    }
    first->weights().begin_partial_staging();
    for (const NamedTensor& tensor : tensors) {
      if (tensor.name != "model.layers.1.mlp.down_proj.weight") continue;
      first->weights().stage(tensor.name, DType::kF32, tensor.shape, tensor.bytes());
    }
    first->weights().finish_staging();
    const uint64_t staged = backend.staged_weights_hash();
    EXPECT_EQ(backend.weights_hash(), before);
    backend.commit_weights();
    EXPECT_EQ(backend.weights_hash(), staged);
    EXPECT_NE(staged, before);
    load_tensors(*second, tensors);
    EXPECT_EQ(second->backend().weights_hash(), staged);
    // A tensor that the leader cannot read to its end is none on any rank.
    std::vector<NamedTensor> broken = tiny_tensors(1);
    for (NamedTensor& tensor : broken) {
      if (tensor.name != "model.layers.1.mlp.down_proj.weight") continue;
      tensor.values.back() = std::numeric_limits<float>::quiet_NaN();
    }
    EXPECT_THROW(load_tensors(*first, broken), Error);
    backend.discard_weights();
    // What is discarded leaves no trace.
    load_tensors(*first, tiny_tensors(1));
    EXPECT_EQ(backend.weights_hash(), before);
    first->weights().begin_staging();
    backend.discard_weights();
    EXPECT_EQ(backend.weights_hash(), before);
    EXPECT_THROW(backend.commit_weights(), Error);
  }
  first_followers.join();
  for (const std::string& error : first_followers.errors) EXPECT_EQ(error, "");
}

TEST(TensorParallelReplica, FailsAtItsLeaderWhereAFollowerCannotStart) {
  const Config config = cpu_config();
  Config too_small = config;
  too_small.engine.kv_cache_memory = 1;
  Followers followers(too_small, 2);
  try {
    followers.make_leader(config);
    FAIL() << "a follower without a page";
  } catch (const Error& error) {
    EXPECT_EQ(error.info.field, "engine.kv_cache_memory") << error.what();
  }
}

TEST(TensorParallelReplica, EndsWhereAFollowerHasGone) {
  const Config config = cpu_config();
  std::vector<bridge::OwnedFd> sockets(2);
  int ends[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
  sockets[1].reset(ends[0]);
  bridge::OwnedFd follower(ends[1]);
  LeadingRank leading(std::move(sockets), 60s, soon());
  // It says that it is ready, and hears of weights, but is never there for a step.
  std::thread thread([&] {
    const auto communicator = join_replica(follower.get(), {1, 2}, 60s, soon()).communicator;
    Replica replica(config, tiny_model_config(), {.communicator = communicator});
    const FollowerReady ready{.num_pages = replica.backend_info().kv.num_pages,
                              .fingerprint = replica.backend_info().fingerprint,
                              .shards = {}};
    std::vector<uint8_t> body = {0};
    const std::vector<uint8_t> rest = ready.encode();
    body.insert(body.end(), rest.begin(), rest.end());
    bridge::send_frame(follower.get(), std::move(body), {}, soon());
  });
  const std::unique_ptr<Replica> leader =
      leading.make_replica(config, tiny_model_config(), {}, soon());
  thread.join();
  follower.reset();
  EXPECT_THROW(
      {
        try {
          leader->backend().begin_staging();
        } catch (const Error& error) {
          EXPECT_EQ(error.info.code, ErrorCode::kUnavailable);
          EXPECT_EQ(error.info.field, "rank 1 of 2 ranks of this replica");
          throw;
        }
      },
      Error);
}

// Over the socket, before a deadline: with it devices find each other.
TEST(TensorParallelReplica, HandsTheLinkOfItsDevicesToEveryFollower) {
  const std::vector<std::byte> link(128, std::byte{7});
  for (const auto& sent : {link, std::vector<std::byte>()}) {
    std::vector<bridge::OwnedFd> sockets(2);
    int ends[2];
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    sockets[1].reset(ends[0]);
    const bridge::OwnedFd follower(ends[1]);
    const LeadingRank leading(std::move(sockets), 60s, soon(), sent);
    EXPECT_EQ(join_replica(follower.get(), {1, 2}, 60s, soon()).device_link, sent);
    EXPECT_THROW(join_replica(follower.get(), {1, 2}, 60s, std::chrono::steady_clock::now() + 50ms),
                 Error);
  }
}

TEST(PlanCodec, GivesBackEveryField) {
  kernels::StepPlan plan;
  plan.page_copies = {{1, 2, 3}, {4, 5, 16}};
  plan.slot_inits = {
      {.slot = 3,
       .sampling = {.temperature = 0.5f, .top_k = 7, .top_p = 0.25f, .min_p = 0.125f},
       .seed = ~uint64_t{0},
       .prompt_hash = 1234567890123456789u,
       .sample_index = 9,
       .next_position = 11,
       .min_position = 12,
       .end_position = 13,
       .stop_token_ids = {1, 5, 70}},
      {.slot = 1}};
  plan.input_ids = {5, kernels::kPendingToken, 7};
  plan.positions = {0, 9, kernels::kPadPosition};
  plan.sequences = {
      {.slot = 3, .row_begin = 0, .num_rows = 3, .page_table_begin = 0, .num_pages = 2}};
  plan.page_tables = {8, 6};
  plan.samples = {{1, 3}};
  plan.scores = {{0, 44, 0.75f}};
  plan.wants_entropy = true;
  std::vector<uint8_t> bytes;
  encode_plan(plan, bytes);
  const kernels::StepPlan back = decode_plan(bytes);
  std::vector<uint8_t> again;
  encode_plan(back, again);
  EXPECT_EQ(again, bytes);
  EXPECT_EQ(back.slot_inits[0].stop_token_ids, plan.slot_inits[0].stop_token_ids);
  EXPECT_EQ(back.slot_inits[0].prompt_hash, plan.slot_inits[0].prompt_hash);
  EXPECT_EQ(back.slot_inits[0].sampling.min_p, 0.125f);
  EXPECT_EQ(back.slot_inits[0].sample_index, 9u);
  EXPECT_EQ(back.slot_inits[0].end_position, 13);
  EXPECT_EQ(back.scores[0].token, 44);
  EXPECT_EQ(back.page_copies[1].num_tokens, 16);
  EXPECT_EQ(back.sequences[0].num_pages, 2);
  EXPECT_TRUE(back.wants_entropy);
  for (size_t length = 0; length < bytes.size(); ++length) {
    EXPECT_THROW(decode_plan(std::span(bytes).first(length)), Error) << length << " bytes";
  }
  bytes.push_back(0);
  EXPECT_THROW(decode_plan(bytes), Error);
}

}  // namespace
}  // namespace rollpack::rollout
