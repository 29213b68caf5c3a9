// What each verb of the protocol does: reads its fields, asks the service, the delivery or the
// weight inbox, answers. One member function a verb, listed once in verbs.cc.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/delivery/delivery.h"
#include "trainer_bridge/server/batch_waiters.h"
#include "trainer_bridge/server/connection.h"
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
  std::string instance;                                         // of this server's life
  std::function<void(std::function<void()>)> on_server_thread;  // from any thread
  std::function<int64_t()> num_pending_samples;                 // committed, not yet delivered to
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

 private:
  struct Entry;
  static const std::vector<Entry>& entries();

  void hello(Request& request);
  void submit(Request& request);
  void next_batch(Request& request);
  void release(Request& request);
  void abort(Request& request);
  void pause(Request& request);
  void resume(Request& request);
  void score(Request& request);
  void update_weights(Request& request);
  void weight_chunk(Request& request, int64_t version);
  void get_weight_version(Request& request);
  void stats(Request& request);
  void health(Request& request);
  void inspect(Request& request);
  void shutdown(Request& request);

  VerbParts parts_;
};

}  // namespace rollpack::bridge
