// What rank 0 and the bridges of other nodes say to each other, on the links of the ranks that hold
// those bridges, between the messages of cluster/messages.h; and how other ranks find them.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "rollout/cluster/kept_samples.h"
#include "trainer_bridge/contract/delivery_log.h"
#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/contract/sample.h"

// From a node's bridge, but where another sender is named; a ticket is answered once, under its
// number.
namespace rollpack::rollout::asked {

struct Opened {};  // its clients may connect from now on
struct Submit {
  uint64_t ticket = 0;
  std::vector<bridge::PromptRequest> prompts;
};
struct Abort {
  uint64_t ticket = 0;
  std::optional<int64_t> request_id;  // nullopt: all of this node
};
struct Pause {
  uint64_t ticket = 0;
  bridge::InFlight in_flight = bridge::InFlight::kKeep;
};
struct Resume {};
struct Sleep {  // answered by Slept
  uint64_t ticket = 0;
  int level = 1;
  bridge::InFlight in_flight = bridge::InFlight::kKeep;
};
struct WakeUp {  // likewise
  uint64_t ticket = 0;
  bridge::MemoryTags tags;
};
struct Score {
  uint64_t ticket = 0;
  std::vector<bridge::ScoreSequence> sequences;
};
struct FindWeights {
  uint64_t ticket = 0;
};
struct FindStats {
  uint64_t ticket = 0;
};
struct Shutdown {};
struct Present {};  // the answer to Ping
// From any rank that works for another node: where is its bridge? Answered by BridgeAt.
struct FindBridge {
  int32_t node = 0;
};
// What its delivery writes down, in order.
struct Formed {
  std::vector<bridge::FormedBatch> batches;
};
struct Released {
  uint64_t batch_seq = 0;
};
struct WhenDurable {  // answered once all of that is on disk, and what was asked for before
  uint64_t ticket = 0;
};
struct Received {  // of samples; rank 0 may send as much again
  uint64_t num_bytes = 0;
};

}  // namespace rollpack::rollout::asked

// To a node's bridge, but where another receiver is named.
namespace rollpack::rollout::told {

struct State {
  int64_t weight_version = 0;
  std::optional<int64_t> awaited_weight_version;
  bridge::Outcome health;
  bridge::SleepState sleep;
};
struct Open {  // all ranks are ready
  bridge::ServiceInfo info;
  State state;
  std::optional<bridge::RestoredDelivery> restored;  // where there is a journal
};
// Answers: of submit (a request id), abort (how many samples), pause and what waits for the disk.
struct Number {
  uint64_t ticket = 0;
  bridge::Outcome error;
  int64_t value = 0;
};
struct Scores {
  uint64_t ticket = 0;
  bridge::Outcome error;
  std::vector<bridge::ScoredSequence> results;
};
struct Slept {  // or woken up
  uint64_t ticket = 0;
  bridge::Outcome error;
  bridge::SleepState state;
};
struct Weights {
  uint64_t ticket = 0;
  bridge::WeightsInUse weights;
};
struct Stats {
  uint64_t ticket = 0;
  bridge::RolloutService::Numbers values;
};
struct Failed {
  bridge::FailedSample sample;
};
struct Decided {  // KeptSamples::decide
  int32_t worker = 0;
  bridge::SampleKey key;
  int32_t attempt = 0;
  Verdict verdict = Verdict::kDrop;
};
struct Forgotten {  // KeptSamples::forget
  int32_t worker = 0;
};
struct Ping {};  // answered by the thread that serves its clients
// To a rank that asked. port 0: there is none that could be reached.
struct BridgeAt {
  int32_t node = 0;
  std::string address;
  int32_t port = 0;
};

}  // namespace rollpack::rollout::told

namespace rollpack::rollout {

using NodeRequest =
    std::variant<asked::Opened, asked::Submit, asked::Abort, asked::Pause, asked::Resume,
                 asked::Sleep, asked::WakeUp, asked::Score, asked::FindWeights, asked::FindStats,
                 asked::Shutdown, asked::Present, asked::FindBridge, asked::Received, asked::Formed,
                 asked::Released, asked::WhenDurable>;
using NodeNews = std::variant<told::State, told::Open, told::Number, told::Scores, told::Slept,
                              told::Weights, told::Stats, told::Failed, told::Decided,
                              told::Forgotten, told::Ping, told::BridgeAt>;

// Frames begin with a byte with which no message between ranks begins; samples travel as those of
// sample_frame.h. Errors of encode(): resource_exhausted for what no frame holds.
bool is_node_frame(std::span<const uint8_t> body);
std::vector<uint8_t> encode(const NodeRequest& request);
std::vector<uint8_t> encode(const NodeNews& news);
// Errors: data_loss.
NodeRequest decode_node_request(std::span<const uint8_t> body);
NodeNews decode_node_news(std::span<const uint8_t> body);

}  // namespace rollpack::rollout
