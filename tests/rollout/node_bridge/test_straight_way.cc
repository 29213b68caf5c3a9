// A rank's way to another node's bridge, over the loopback interface: to one that the test plays,
// and to a real one's inlet.
#include "rollout/node_bridge/straight_way.h"

#include <sys/socket.h>

#include <chrono>
#include <condition_variable>
#include <list>
#include <mutex>
#include <optional>
#include <thread>

#include <gtest/gtest.h>

#include "rollout/cluster/handshake.h"
#include "rollout/cluster/meeting.h"
#include "rollout/cluster/memory_relay.h"
#include "rollout/node_bridge/kept_store.h"
#include "rollout/node_bridge/sample_frame.h"
#include "rollout/node_bridge/sample_inlet.h"
#include "tests/rollout/cluster/thread_ranks.h"
#include "trainer_bridge/wire/frame.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

constexpr int32_t kRank = 7;
constexpr auto kPatience = 20s;  // for what must come
const std::string kToken = "token of the job", kAnswer = "answer of the job";

bridge::Sample sample_for(int32_t node, int32_t index, size_t num_tokens = 2) {
  return {.key = {.request_id = 3,
                  .prompt_id = {.text = "p"},
                  .sample_index = index,
                  .group_size = 64,
                  .node = node},
          .prompt_ids = std::make_shared<const std::vector<int32_t>>(3, 1),
          .response_ids = std::vector<int32_t>(num_tokens, 4),
          .finish_reason = bridge::FinishReason::kLength};
}

// Another node's bridge, as far as a rank can tell.
class PlayedBridge {
 public:
  TcpEndpoint endpoint() const { return listener_.endpoint; }
  // The next connection, once it has said who it is.
  bridge::OwnedFd accept() {
    bridge::OwnedFd socket;
    const auto deadline = Clock::now() + kPatience;
    while (!socket && Clock::now() < deadline) {
      socket.reset(::accept4(listener_.socket.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (!socket) std::this_thread::sleep_for(1ms);
    }
    const auto hello = bridge::receive_frame(socket.get(), deadline);
    const std::optional<Hello> said = decode_hello(hello.value().body, kToken);
    EXPECT_TRUE(said && said->brings_samples && said->rank == kRank);
    return socket;
  }
  static void say(const bridge::OwnedFd& socket, std::vector<uint8_t> body) {
    bridge::send_frame(socket.get(), std::move(body), {}, Clock::now() + kPatience);
  }
  static SampleFrame take(const bridge::OwnedFd& socket) {
    auto frame = bridge::receive_frame(socket.get(), Clock::now() + kPatience);
    return decode_sample_frame(std::move(frame.value().body));
  }
  static bool is_closed(const bridge::OwnedFd& socket) {
    try {
      return !bridge::receive_frame(socket.get(), Clock::now() + kPatience);
    } catch (const Error&) {
      return true;  // reset
    }
  }

 private:
  const TcpListener listener_ = listen_tcp({.interface = "lo"});
};

class StraightWayTest : public ::testing::Test {
 protected:
  StraightWay& way(StraightWay::Options options = {}) {
    options.rank = kRank;
    options.token = kToken;
    options.answer = kAnswer;
    way_.emplace(options,
                 StraightWay::Ways{.tell =
                                       [this](const Event& event) {
                                         const std::lock_guard lock(mutex_);
                                         events_.push_back(event);
                                         changed_.notify_all();
                                       },
                                   .find =
                                       [this](const NodeRequest& request) {
                                         asked.push_back(std::get<asked::FindBridge>(request).node);
                                       }});
    return *way_;
  }
  static void tell_place(StraightWay& way, int32_t node, const PlayedBridge& bridge) {
    way.found({node, bridge.endpoint().addresses.at(0), bridge.endpoint().port});
  }
  bool put(int32_t node, int32_t index, size_t num_tokens = 2) {
    bridge::Sample sample = sample_for(node, index, num_tokens);
    return way_->put(sample, /*attempt=*/5);
  }
  // What rank 0 has been told, once there are that many.
  std::vector<Event> told(size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, kPatience, [&] { return events_.size() >= count; });
    EXPECT_EQ(events_.size(), count);
    return events_;
  }

  std::vector<int32_t> asked;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Event> events_;
  std::optional<StraightWay> way_;  // ends before what it tells
};

std::vector<int32_t> kept_indices(const std::vector<Event>& events) {
  std::vector<int32_t> indices;
  for (const Event& event : events) {
    EXPECT_EQ(std::get<SampleKept>(event).attempt, 5);
    indices.push_back(std::get<SampleKept>(event).key.sample_index);
  }
  return indices;
}

TEST_F(StraightWayTest, ItAsksOnceWhereABridgeIsAndUntilItKnowsSamplesGoThroughRank0) {
  way().expect(2);
  way_->expect(2);
  EXPECT_EQ(asked, std::vector{2});
  EXPECT_FALSE(put(2, 0));
  EXPECT_FALSE(put(9, 0)) << "never heard of";
  way_->found({.node = 2, .address = "", .port = 0});
  EXPECT_FALSE(put(2, 0)) << "it cannot be reached";
}

TEST_F(StraightWayTest, Rank0HearsOfASampleOnceTheBridgeHasIt) {
  PlayedBridge bridge;
  tell_place(way(), 2, bridge);
  EXPECT_TRUE(put(2, 0) && put(2, 1));
  const bridge::OwnedFd link = bridge.accept();
  PlayedBridge::say(link, encode_answer(kAnswer));
  const SampleFrame first = PlayedBridge::take(link);
  EXPECT_EQ(first.worker, kRank);
  EXPECT_EQ(first.attempt, 5);
  EXPECT_EQ(first.sample.key.sample_index, 0);
  EXPECT_EQ(PlayedBridge::take(link).sample.key.sample_index, 1);
  told(0);
  PlayedBridge::say(link, encode_receipt(1));
  EXPECT_EQ(kept_indices(told(1)), std::vector{0});
  EXPECT_TRUE(put(2, 2)) << "the link is kept";
  EXPECT_EQ(PlayedBridge::take(link).sample.key.sample_index, 2);
  PlayedBridge::say(link, encode_receipt(3));
  EXPECT_EQ(kept_indices(told(3)), (std::vector{0, 1, 2}));
}

// It stands still, or the network between them does.
TEST_F(StraightWayTest, WhatGetsNoReceiptInTimeGoesThroughRank0AndIsWithdrawn) {
  PlayedBridge bridge;
  tell_place(way({.limit = 800ms}), 2, bridge);
  EXPECT_TRUE(put(2, 0) && put(2, 1));
  bridge::OwnedFd link = bridge.accept();
  PlayedBridge::say(link, encode_answer(kAnswer));
  PlayedBridge::take(link);
  PlayedBridge::take(link);
  PlayedBridge::say(link, encode_receipt(1));
  const std::vector<Event> events = told(3);
  EXPECT_EQ(std::get<SampleKept>(events[0]).key.sample_index, 0);
  EXPECT_EQ(std::get<SampleDone>(events[1]).sample.key.sample_index, 1);
  EXPECT_EQ(std::get<SampleDone>(events[1]).sample.response_ids.size(), 2u) << "whole";
  EXPECT_EQ(std::get<SampleWithdrawn>(events[2]).key.sample_index, 1);
  EXPECT_EQ(std::get<SampleWithdrawn>(events[2]).attempt, 5);
  EXPECT_FALSE(put(2, 2)) << "not tried again at once";
  EXPECT_TRUE(PlayedBridge::is_closed(link));
  const auto deadline = Clock::now() + kPatience;
  while (!put(2, 3)) {
    ASSERT_LT(Clock::now(), deadline) << "tried again later";
    std::this_thread::sleep_for(5ms);
  }
  link = bridge.accept();
  PlayedBridge::say(link, encode_answer(kAnswer));
  PlayedBridge::take(link);
  PlayedBridge::say(link, encode_receipt(1));
  EXPECT_EQ(std::get<SampleKept>(told(4)[3]).key.sample_index, 3);
}

TEST_F(StraightWayTest, NothingIsSentToWhoDoesNotShowThatItIsOfThisJob) {
  PlayedBridge bridge;
  tell_place(way(), 2, bridge);
  EXPECT_TRUE(put(2, 0));
  const bridge::OwnedFd link = bridge.accept();
  PlayedBridge::say(link, encode_answer("answer of another job"));
  EXPECT_TRUE(std::holds_alternative<SampleDone>(told(1)[0])) << "and nothing to withdraw";
  EXPECT_TRUE(PlayedBridge::is_closed(link));
}

TEST_F(StraightWayTest, WhereNobodyListensSamplesGoThroughRank0) {
  TcpEndpoint gone;
  {
    const PlayedBridge bridge;
    gone = bridge.endpoint();
  }
  way().found({2, gone.addresses.at(0), gone.port});
  EXPECT_TRUE(put(2, 0));
  EXPECT_TRUE(std::holds_alternative<SampleDone>(told(1)[0]));
}

TEST_F(StraightWayTest, BytesWithoutAReceiptAreBounded) {
  PlayedBridge one, other;
  tell_place(way({.max_link_bytes = 4000, .max_bytes = 6000}), 1, one);
  tell_place(*way_, 2, other);
  EXPECT_FALSE(put(1, 0, 1000)) << "alone too large";
  EXPECT_TRUE(put(1, 1, 700));
  EXPECT_FALSE(put(1, 2, 700)) << "of this link";
  EXPECT_TRUE(put(2, 3, 500));
  EXPECT_FALSE(put(2, 4, 300)) << "of all";
  const bridge::OwnedFd link = one.accept();
  PlayedBridge::say(link, encode_answer(kAnswer));
  PlayedBridge::take(link);
  PlayedBridge::say(link, encode_receipt(1));
  told(1);
  EXPECT_TRUE(put(1, 5, 700));
}

TEST_F(StraightWayTest, ALinkIsClosedForAnotherOnlyWhenItIsIdle) {
  PlayedBridge first, second, third;
  way({.max_links = 2});
  tell_place(*way_, 1, first);
  tell_place(*way_, 2, second);
  tell_place(*way_, 3, third);
  EXPECT_TRUE(put(1, 0) && put(2, 1));
  EXPECT_FALSE(put(3, 2)) << "both are in use";
  const bridge::OwnedFd link = first.accept(), busy = second.accept();
  PlayedBridge::say(link, encode_answer(kAnswer));
  PlayedBridge::take(link);
  PlayedBridge::say(link, encode_receipt(1));
  told(1);
  EXPECT_TRUE(put(3, 2));
  EXPECT_TRUE(PlayedBridge::is_closed(link));
  const bridge::OwnedFd instead = third.accept();
  PlayedBridge::say(instead, encode_answer(kAnswer));
  PlayedBridge::take(instead);
  EXPECT_FALSE(put(1, 3));
  PlayedBridge::say(instead, encode_receipt(1));
  told(2);
  EXPECT_TRUE(put(1, 4)) << "opened again";
  first.accept();
}

TEST_F(StraightWayTest, AnIdleLinkIsClosed) {
  PlayedBridge bridge;
  tell_place(way({.limit = 800ms, .idle = 100ms}), 2, bridge);
  EXPECT_TRUE(put(2, 0));
  const bridge::OwnedFd link = bridge.accept();
  PlayedBridge::say(link, encode_answer(kAnswer));
  PlayedBridge::take(link);
  PlayedBridge::say(link, encode_receipt(1));
  EXPECT_TRUE(PlayedBridge::is_closed(link));
  EXPECT_TRUE(put(2, 1));
  bridge.accept();
}

TEST_F(StraightWayTest, WhatIsUnderWayAtTheEndGoesThroughRank0) {
  PlayedBridge bridge;
  tell_place(way(), 2, bridge);
  way_->flush(Clock::now() + kPatience);  // nothing is
  EXPECT_TRUE(put(2, 0));
  const bridge::OwnedFd link = bridge.accept();
  way_->flush(Clock::now() + 300ms);
  EXPECT_TRUE(std::holds_alternative<SampleDone>(told(1)[0]));
}

// A real bridge's end: the relay that takes connections, the inlet, the store.
class StraightToABridge : public StraightWayTest {
 protected:
  StraightToABridge() {
    relay_.set_take_samples(
        [this](int32_t worker, bridge::OwnedFd socket) { inlet.admit(worker, std::move(socket)); });
  }
  bridge::OwnedFd connect(const std::string& token, int rank) {
    bridge::OwnedFd socket =
        connect_tcp(endpoint_.addresses.at(0), endpoint_.port, Clock::now() + kPatience);
    PlayedBridge::say(socket, encode_hello({.rank = rank, .brings_samples = true}, token));
    return socket;
  }

  KeepingSink sink;
  KeptStore store{sink};
  SampleInlet inlet{random_token(), 1, store};
  TcpListener listener_ = listen_tcp({.interface = "lo"});
  const TcpEndpoint endpoint_ = listener_.endpoint;
  ReceivedMemory memory_;
  MemoryRelay relay_{memory_,
                     std::move(listener_),
                     {.token = kToken, .reply = kAnswer, .limit = 5s, .answer = [](auto) {}}};
};

TEST_F(StraightToABridge, ASampleWaitsThereForItsVerdict) {
  way().found({2, endpoint_.addresses.at(0), endpoint_.port});
  for (int32_t index = 0; index < 20; ++index) EXPECT_TRUE(put(2, index));
  told(20);
  EXPECT_EQ(store.num_samples(), 20);
  store.decide(kRank, sample_for(2, 0).key, 5, Verdict::kCommit);
  store.decide(kRank, sample_for(2, 1).key, 5, Verdict::kDrop);
  EXPECT_EQ(sink.samples().size(), 1u);
  store.forget(kRank);
  EXPECT_TRUE(put(2, 20)) << "of a rank that has been given up";
  told(21);
  EXPECT_EQ(store.num_samples(), 0);
  EXPECT_EQ(store.num_dropped(), 20);
}

TEST_F(StraightToABridge, StrangersGetNoAnswer) {
  EXPECT_TRUE(PlayedBridge::is_closed(connect("token of another job", 5)));
}

TEST_F(StraightToABridge, ItTakesABoundedNumberOfLinks) {
  std::list<bridge::OwnedFd> links;
  for (int rank = 0; rank < SampleInlet::kMaxRemoteLinks; ++rank) {
    links.push_back(connect(kToken, rank));
    ASSERT_TRUE(bridge::receive_frame(links.back().get(), Clock::now() + kPatience));
  }
  const bridge::OwnedFd refused = connect(kToken, 1000);
  EXPECT_TRUE(bridge::receive_frame(refused.get(), Clock::now() + kPatience)) << "the answer";
  EXPECT_TRUE(PlayedBridge::is_closed(refused));
  links.pop_front();
  bool is_taken = false;
  const auto deadline = Clock::now() + kPatience;
  while (!is_taken && Clock::now() < deadline) {
    const bridge::OwnedFd next = connect(kToken, 1001);
    PlayedBridge::say(next, encode_sample_frame(1001, 1, sample_for(2, 0)));
    try {
      const auto answer = bridge::receive_frame(next.get(), deadline);
      is_taken = answer && bridge::receive_frame(next.get(), deadline);
    } catch (const Error&) {  // reset: the one that left has not been noticed yet
    }
  }
  EXPECT_TRUE(is_taken);
}

}  // namespace
}  // namespace rollpack::rollout
