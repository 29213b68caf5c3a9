// The bridge's server: the socket, its clients and the thread that serves them. It moves frames and
// batches; what is asked is answered by the RolloutService, what is made comes in as a SampleSink.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "trainer_bridge/contract/delivery_log.h"
#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/contract/sample_sink.h"
#include "trainer_bridge/layout/batch_layout.h"
#include "trainer_bridge/server/wait_histogram.h"
#include "trainer_bridge/wire/frame_socket.h"

namespace rollpack::bridge {

struct ServerOptions {
  std::string socket = "run/rollpack.sock";
  int32_t slots = 4;  // 1 to 253: their descriptors travel in one frame
  int64_t slot_bytes = int64_t{64} << 20;
  LayoutOptions layout;
  int32_t max_clients = 1024;        // two descriptors each
  int64_t max_held_samples = 65536;  // beyond it submit says would_block
  int64_t max_version_lag = -1;      // samples staler than this become failures; -1: none do
  FrameSocketOptions frames;         // of each client
  // Outlives the server. Replies that promise something wait until it is durable there.
  DeliveryLog* log = nullptr;
  RestoredDelivery restored;  // from the same log
};

// What a server counts, as of one moment.
struct ServerNumbers {
  std::vector<std::pair<std::string, double>> values;  // as in stats, without the service's
  WaitHistogram batch_waits;
  Outcome fault;  // why no batch can be trusted any more, if so
};

class Server final : public SampleSink {
 public:
  // Takes the socket's lock and the slots' memory; nobody can connect yet.
  // Errors: invalid_argument naming the bridge.* field; failed_precondition when another server has
  // the socket; resource_exhausted when the slots do not fit into memory.
  explicit Server(ServerOptions options);
  // Stops.
  ~Server() override;

  // Listens; hello succeeds from here on. `service` outlives the stop.
  void start(RolloutService& service);
  // What becomes ServerOptions::log and restored, where they are known late. Before start().
  void keep_log(DeliveryLog& log, RestoredDelivery restored);
  // Tells clients, in stats, at which port of this machine the program's metrics are. Before
  // start().
  void set_metrics_port(int32_t port);
  // Fails what waits, flushes replies for at most 300 ms, closes, removes socket and lock. Not from
  // the service's calls. A server is started once.
  void stop();

  // Any thread, never blocking. Samples are kept until a client has them; while more than
  // max_held_samples are, submit is refused. After stop() they are dropped.
  void commit(Sample sample) override;
  void fail(FailedSample sample) override;

  // Looks at once whether the service is still healthy; without it waiting calls learn of a change
  // within 20 ms. Any thread.
  void health_changed();

  // Calls `done` with the numbers of then on the server's thread, soon; never before start() and
  // not at all after stop(). Any thread, never blocking.
  void ask_numbers(std::function<void(ServerNumbers)> done);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace rollpack::bridge
