// Which way a rank's samples go: those that its own node's bridge has asked for go there, and rank
// 0 is told; all others go to rank 0.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>

#include "rollout/cluster/messages.h"
#include "rollout/node_bridge/node_bridge.h"
#include "rollout/node_bridge/sample_frame.h"
#include "rollout/node_bridge/sample_inlet.h"

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

  // Any thread; waits while a socket is full.
  void send(Event event) const {
    auto* done = std::get_if<SampleDone>(&event);
    if (done == nullptr || done->sample.key.node != node_) return tell_(event);
    const SampleKept kept{done->sample.key, done->attempt, done->sample.finish_reason};
    try {
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
  const int32_t node_;
  const int32_t rank_ = 0;
  NodeBridge* const bridge_ = nullptr;
  const std::unique_ptr<SampleOutlet> outlet_;
  const TellRank0 tell_;
};

}  // namespace rollpack::rollout
