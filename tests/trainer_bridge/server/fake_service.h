// A RolloutService without a model: samples follow from the prompt by a formula that any test can
// repeat. For tests of the server and of its clients.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/contract/sample_sink.h"

namespace rollpack::bridge {

inline constexpr int32_t kFakeVocab = 64;
inline constexpr int32_t kFakeEos = 2;  // said in hello; ends a response only as a stop_token_id

inline constexpr int64_t kFakeParityTokens = 16;

struct FakeOptions {
  int32_t n = 2;
  int32_t response_length = 8;
  bool with_entropy = false;
  bool takes_lent_weights = true;
  std::chrono::milliseconds sample_time{0};  // each sample takes that long
  int64_t max_open_samples = 1 << 20;        // beyond it submit says would_block
};

// Response token i of sample s of a prompt: (sum of the prompt's ids + s + i) % kFakeVocab, drawn
// with logprob -0.5 - i / 64 at any temperature; nothing is cut off. It ends at response_length or
// behind a token of stop_token_ids. A prompt whose first id is kFakeVocab - 1 fails, non_finite.
std::vector<int32_t> fake_response(const std::vector<int32_t>& prompt, int32_t sample_index,
                                   int32_t length);

// Tensors a weight update must bring, float32, float16 or bfloat16, with their shapes.
const std::map<std::string, std::vector<int64_t>>& fake_tensors();

class FakeService : public RolloutService {
 public:
  FakeService(FakeOptions options, SampleSink& sink);
  ~FakeService() override;

  ServiceInfo info() const override;
  int64_t submit(std::vector<PromptRequest> prompts);
  void submit(std::vector<PromptRequest> prompts, Answer<int64_t> done) override {
    done(std::nullopt, submit(std::move(prompts)));
  }
  int64_t abort(std::optional<int64_t> request_id);
  void abort(std::optional<int64_t> request_id, Answer<int64_t> done) override {
    done(std::nullopt, abort(request_id));
  }
  void pause(InFlight in_flight, OutcomeCallback done) override;
  void resume() override;
  // Pauses and resumes, and keeps the state: 1000 bytes are held, less 300 for each tag asleep.
  void sleep(int level, InFlight in_flight, Answer<SleepState> done) override;
  void wake_up(MemoryTags tags, Answer<SleepState> done) override;
  SleepState sleep_state() const override;
  void score(std::vector<ScoreSequence> sequences,
             Answer<std::vector<ScoredSequence>> done) override;
  void begin_weights(WeightUpdate update, OutcomeCallback done) override;
  void stage_weights(WeightChunk chunk, OutcomeCallback done) override;
  bool takes_lent_weights() const override { return options_.takes_lent_weights; }
  void commit_weights(InFlight in_flight, OutcomeCallback done) override;
  void cancel_weights() override;
  int64_t weight_version() const override;
  // Its hash is the version, its times are made up.
  WeightsInUse weights_in_use() const;
  void find_weights(Answer<WeightsInUse> done) override { done(std::nullopt, weights_in_use()); }
  Numbers stats() const;
  void find_stats(Answer<Numbers> done) override { done(std::nullopt, stats()); }
  Outcome health() const override;
  void shutdown() override;

  void set_health(Outcome outcome);
  // Called by shutdown(), e.g. to end the program.
  std::function<void()> on_shutdown = [] {};
  int64_t num_cancelled_updates() const;
  // Of tensors that were lent; only between updates.
  const std::map<std::string, uint32_t>& lent_crc32() const { return lent_crc32_; }

 private:
  struct Work {
    SampleKey key;
    std::shared_ptr<const std::vector<int32_t>> prompt_ids;
    SamplingOverrides sampling;
  };

  void run();
  Outcome failure_to_read(const WeightTensor& tensor, const PeerMemory& lender);
  void finish(const Work& work, bool is_aborted, int64_t version);
  std::vector<Work> take_open(std::optional<int64_t> request_id);
  void hand_back(const std::vector<Work>& aborted);

  const FakeOptions options_;
  SampleSink& sink_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Work> queue_;
  std::optional<std::pair<OutcomeCallback, bool>> settling_;  // once idle; then paused or not
  bool is_working_ = false;
  bool is_paused_ = false;
  SleepState sleep_{.held_bytes = 1000};
  bool is_stopping_ = false;
  int64_t last_request_id_ = 0;
  int64_t version_ = 0;
  std::optional<int64_t> next_version_;
  std::map<std::string, std::vector<int64_t>> staged_;
  std::map<std::string, uint32_t> lent_crc32_;
  int64_t num_samples_ = 0;
  int64_t num_cancelled_updates_ = 0;
  Outcome health_;
  std::thread worker_;
};

}  // namespace rollpack::bridge
