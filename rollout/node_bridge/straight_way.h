// A rank's way to the bridges of other nodes: what it makes for them goes there in one hop, and
// rank 0 is told once the bridge has said that it has it. What cannot go, or gets no receipt in
// time, goes through rank 0.
//
// A link is opened with the first sample for a node, kept while samples go and closed when it has
// been idle; so the links of a job are those that its requests need. Nobody waits for one: a thread
// of its own serves all.
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
#include <vector>

#include "rollout/cluster/messages.h"
#include "rollout/cluster/tcp_socket.h"
#include "rollout/node_bridge/node_messages.h"
#include "trainer_bridge/wire/asio.h"
#include "trainer_bridge/wire/frame_socket.h"

namespace rollpack::rollout {

// Thread-safe.
class StraightWay {
 public:
  struct Options {
    int32_t rank = 0;
    std::string token, answer;                // of the job, see Meeting
    std::chrono::milliseconds limit{15000};   // for a receipt; half a lease
    std::chrono::milliseconds idle{30000};    // then a link is closed
    size_t max_links = 16;                    // open at once
    size_t max_link_bytes = size_t{8} << 20;  // without a receipt: 6 ms of 10 Gbit/s
    size_t max_bytes = size_t{32} << 20;      // likewise, of all links
  };
  struct Ways {
    std::function<void(const Event&)> tell;        // rank 0; may wait
    std::function<void(const NodeRequest&)> find;  // asks rank 0, which answers to found()
  };
  StraightWay(Options options, Ways ways);
  // What is under way goes nowhere any more.
  ~StraightWay();

  // There is work for `node`: asks where its bridge is, where that is not known.
  void expect(int32_t node);
  void found(const told::BridgeAt& bridge);

  // True: the sample is taken, and rank 0 will hear of it, by SampleKept or SampleDone. False: it
  // is as it was, and has to go through rank 0.
  // Errors: those of encode_sample_frame().
  bool put(bridge::Sample& sample, int32_t attempt);

  // Waits until nothing is under way; what is by then goes through rank 0.
  void flush(std::chrono::steady_clock::time_point deadline);

 private:
  using TimePoint = std::chrono::steady_clock::time_point;
  struct Waiting {
    bridge::Sample sample;
    int32_t attempt = 0;
    std::vector<uint8_t> frame;  // until it is sent
    size_t num_bytes = 0;        // of it
  };
  struct Bridge {
    std::optional<TcpEndpoint> endpoint;  // nullopt: asked for
    bool has_link = false;                // or is to get one
    bool is_greeted = false;              // it has shown the answer
    std::shared_ptr<bridge::FrameSocket> socket;
    std::deque<Waiting> waiting;  // for a receipt, the first num_sent of them
    size_t num_sent = 0;
    size_t num_bytes = 0;       // of what waits
    uint64_t num_received = 0;  // by this link
    TimePoint last_progress;    // of what waits, or since nothing does
    TimePoint shut_until;       // through rank 0 until then
    int num_failures = 0;       // since the last receipt

    bool is_idle() const { return has_link && waiting.empty(); }
  };

  bool has_way(int32_t node, size_t num_bytes) const;
  bool find_link(Bridge& bridge);
  // The rest happens on the thread.
  void serve(int32_t node);
  void open(int32_t node, Bridge& bridge);
  void hear(int32_t node, std::vector<uint8_t> body);
  void take_receipt(int32_t node, uint64_t num_samples);
  static void close(Bridge& bridge);
  // What waits goes through rank 0, and all for this node does for a while.
  void give_up(int32_t node, const std::string& reason);
  void tell_all(const std::vector<Event>& events, size_t num_samples);
  void watch();
  bool check_links();

  const Options options_;
  const Ways ways_;
  bridge::asio::io_context io_{1};
  bridge::asio::executor_work_guard<bridge::asio::io_context::executor_type> stay_;
  bridge::asio::steady_timer timer_{io_};
  bool is_watching_ = false;  // the thread's

  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<int32_t, Bridge> bridges_;  // by node
  size_t num_links_ = 0, num_bytes_ = 0;
  size_t num_under_way_ = 0;  // samples; also those that are being told of
  std::thread thread_;        // once there is something to do
};

}  // namespace rollpack::rollout
