// What each verb of the protocol does: reads its fields, asks the service, the delivery or the
// weight inbox, answers. One member function a verb, listed once in verbs.cc.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/delivery/delivery.h"
#include "trainer_bridge/server/batch_waiters.h"
#include "trainer_bridge/server/connection.h"
#include "trainer_bridge/server/requests.h"
#include "trainer_bridge/shared_memory/slot_ring.h"
#include "trainer_bridge/weight_inbox/weight_inbox.h"

namespace rollpack::bridge {

// What the verbs work on; all of it outlives them.
struct VerbParts {
  RolloutService& service;
  SlotRing& slots;
  Delivery& delivery;
  BatchWaiters& waiters;
  WeightInbox& weights;
  int64_t max_held_samples = 0;
  std::optional<int32_t> metrics_port;
  std::string instance;                                         // of this server's life
  std::function<void(std::function<void()>)> on_server_thread;  // from any thread
  // The same behind all samples that were put into the sink before, ahead of those that come after;
  // at once where this is the server's thread.
  std::function<void(std::function<void()>)> in_order_of_samples;
  // Calls back on the server's thread, at once where nothing is logged.
  std::function<void(std::function<void(const Outcome&)>)> when_durable;
  std::function<int64_t()> num_pending_samples;  // committed, not yet delivered to
  std::function<int64_t()> num_clients;
  std::function<Outcome()> health;
};

class Verbs {
 public:
  explicit Verbs(VerbParts parts) : parts_(std::move(parts)) {}

  // Answers `request`, now or later.
  // Errors (thrown, to become the reply): not_found for an unknown verb; failed_precondition before
  // hello; what the verb's fields and the parts have against it.
  void handle(Request& request);

  // What is counted on this side of the service, by name.
  std::vector<std::pair<std::string, double>> numbers() const;

 private:
  struct Entry;
  static const std::vector<Entry>& entries();

  // Calls `then` on the server's thread; what is thrown there becomes the reply.
  template <class Value>
  Answer<Value> answering(const Responder& responder, std::function<void(Value)> then) const;

  // Replies once what the service and the delivery have written down is on disk.
  void reply_when_durable(const Responder& responder, Json fields = Json::object());

  void hello(Request& request);
  void submit(Request& request);
  void next_batch(Request& request);
  void release(Request& request);
  void abort(Request& request);
  void pause(Request& request);
  void resume(Request& request);
  void sleep(Request& request);
  void wake_up(Request& request);
  Answer<SleepState> sleep_answer(const Responder& responder) const;
  void score(Request& request);
  void update_weights(Request& request);
  void weight_chunk(Request& request, int64_t version);
  void get_weight_version(Request& request);
  void report_probs_diff(Request& request);
  void stats(Request& request);
  void health(Request& request);
  void inspect(Request& request);
  void shutdown(Request& request);

  VerbParts parts_;
  ProbsDiff probs_diff_;  // the last one reported
  int64_t num_probs_diff_reports_ = 0;
};

}  // namespace rollpack::bridge
