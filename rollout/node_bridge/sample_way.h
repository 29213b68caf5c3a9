// Which way a rank's samples go: those that a node's bridge has asked for go there, its own node's
// or another's, and rank 0 is told; all others go to rank 0.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <variant>

#include "rollout/cluster/messages.h"
#include "rollout/node_bridge/node_bridge.h"
#include "rollout/node_bridge/sample_frame.h"
#include "rollout/node_bridge/sample_inlet.h"
#include "rollout/node_bridge/straight_way.h"

namespace rollpack::rollout {

class SampleWay {
 public:
  using TellRank0 = std::function<void(const Event&)>;
  // The bridge is this process's.
  SampleWay(int32_t node, NodeBridge& bridge, TellRank0 tell)
      : node_(node), bridge_(&bridge), tell_(std::move(tell)) {}
  // It is another's.
  SampleWay(int32_t node, int32_t rank, std::unique_ptr<SampleOutlet> outlet, TellRank0 tell)
      : node_(node), rank_(rank), outlet_(std::move(outlet)), tell_(std::move(tell)) {}

  // To the bridges of other nodes but rank 0's; without it all that they asked for goes through
  // rank 0. It outlives this.
  void set_straight_way(StraightWay& straight) { straight_ = &straight; }

  int32_t node() const { return node_; }  // where the rank is

  // A command on its way to the rank's worker: there may be work for other nodes in it.
  void expect(const Command& command) const {
    const auto* work = std::get_if<AddGroups>(&command);
    if (work == nullptr || straight_ == nullptr) return;
    for (const GroupRequest& group : work->groups) {
      if (is_elsewhere(group.key.node)) straight_->expect(group.key.node);
    }
  }

  // Any thread; waits while a socket is full.
  void send(Event event) const {
    auto* done = std::get_if<SampleDone>(&event);
    if (done == nullptr) {
      // Rank 0 leaves once all have said so.
      if (straight_ != nullptr && std::holds_alternative<WorkerStopped>(event)) {
        straight_->flush(std::chrono::steady_clock::now() + kLastWord);
      }
      return tell_(event);
    }
    const SampleKept kept{done->sample.key, done->attempt, done->sample.finish_reason};
    try {
      if (is_elsewhere(kept.key.node)) {
        if (straight_ == nullptr || !straight_->put(done->sample, done->attempt)) tell_(event);
        return;
      }
      if (kept.key.node != node_) return tell_(event);
      if (bridge_ != nullptr) {
        bridge_->keep(kept.attempt, std::move(done->sample));
      } else if (!outlet_->put(encode_sample_frame(rank_, kept.attempt, done->sample))) {
        return tell_(event);
      }
    } catch (const Error& error) {  // no frame holds it
      return tell_(SampleFailed{{kept.key, error.info}, kept.attempt});
    }
    tell_(kept);  // only now: what it speaks of cannot be lost with this process any more
  }

 private:
  // What is under way when the worker stops; the whole job has 600 ms to end.
  static constexpr std::chrono::milliseconds kLastWord{200};

  // Whether a bridge that is neither this node's nor rank 0's has asked for it.
  bool is_elsewhere(int32_t node) const { return node != 0 && node != node_; }

  const int32_t node_;
  const int32_t rank_ = 0;
  NodeBridge* const bridge_ = nullptr;
  const std::unique_ptr<SampleOutlet> outlet_;
  const TellRank0 tell_;
  StraightWay* straight_ = nullptr;
};

}  // namespace rollpack::rollout
