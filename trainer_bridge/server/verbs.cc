#include "trainer_bridge/server/verbs.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <memory>
#include <span>
#include <string>

#include "trainer_bridge/server/replies.h"
#include "trainer_bridge/server/requests.h"
#include "trainer_bridge/shared_memory/peer_memory.h"

namespace rollpack::bridge {
namespace {

void check_no_fds(const Request& request) {
  if (request.fds.empty()) return;
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = "num_fds",
               .value = std::to_string(request.fds.size()),
               .origin = request.verb,
               .allowed = "no file descriptors with this request"});
}

}  // namespace

struct Verbs::Entry {
  std::string_view name;
  void (Verbs::*run)(Request&);
  bool needs_hello = true;
};

const std::vector<Verbs::Entry>& Verbs::entries() {
  static const std::vector<Entry> table = {
      {"hello", &Verbs::hello, false},
      {"submit", &Verbs::submit},
      {"next_batch", &Verbs::next_batch},
      {"release", &Verbs::release},
      {"abort", &Verbs::abort},
      {"pause", &Verbs::pause},
      {"resume", &Verbs::resume},
      {"sleep", &Verbs::sleep},
      {"wake_up", &Verbs::wake_up},
      {"score", &Verbs::score},
      {"update_weights", &Verbs::update_weights},
      {"get_weight_version", &Verbs::get_weight_version},
      {"report_probs_diff", &Verbs::report_probs_diff},
      {"stats", &Verbs::stats},
      {"health", &Verbs::health, false},
      {"inspect", &Verbs::inspect, false},
      {"shutdown", &Verbs::shutdown},
  };
  return table;
}

void Verbs::handle(Request& request) {
  for (const Entry& entry : entries()) {
    if (entry.name != request.verb) continue;
    if (entry.needs_hello && !request.connection.said_hello) {
      throw Error({.code = ErrorCode::kFailedPrecondition,
                   .field = "verb",
                   .value = request.verb,
                   .origin = "request",
                   .allowed = "hello first"});
    }
    return (this->*entry.run)(request);
  }
  std::vector<std::string_view> names(entries().size());
  std::transform(entries().begin(), entries().end(), names.begin(),
                 [](const Entry& entry) { return entry.name; });
  throw Error({.code = ErrorCode::kNotFound,
               .field = "verb",
               .value = quoted(Json(request.verb)),
               .origin = "request",
               .allowed = fmt::format("one of {}", fmt::join(names, ", "))});
}

void Verbs::hello(Request& request) {
  const HelloRequest hello = read_hello(request.fields);
  check_no_fds(request);
  if (hello.protocol_version != kProtocolVersion) {
    throw Error({.code = ErrorCode::kUnsupported,
                 .field = "protocol_version",
                 .value = std::to_string(hello.protocol_version),
                 .origin = "hello",
                 .allowed = std::to_string(kProtocolVersion),
                 .message = "client and server are of different releases"});
  }
  std::vector<OwnedFd> fds;
  fds.reserve(static_cast<size_t>(parts_.slots.num_slots()));
  for (int32_t slot = 0; slot < parts_.slots.num_slots(); ++slot) {
    fds.push_back(OwnedFd::duplicate(parts_.slots.fd(slot)));
  }
  Json reply = hello_reply(parts_.service, parts_.slots, parts_.instance);
  // Seen to be readable, so that tensors need not be copied to be sent.
  reply["reads_memory"] =
      hello.probe && parts_.service.takes_lent_weights() &&
      PeerMemory(request.connection.peer_pid)
          .holds(hello.probe->address, std::as_bytes(std::span(hello.probe->value)));
  if (hello.member) parts_.delivery.join(request.connection.client, *hello.member);
  request.connection.said_hello = true;
  request.responder.ok(std::move(reply), std::move(fds));
}

void Verbs::reply_when_durable(const Responder& responder, Json fields) {
  parts_.when_durable([responder, fields = std::move(fields)](const Outcome& outcome) mutable {
    outcome ? responder.error(*outcome) : responder.ok(std::move(fields));
  });
}

template <class Value>
Answer<Value> Verbs::answering(const Responder& responder, std::function<void(Value)> then) const {
  return [post = parts_.on_server_thread, responder, then = std::move(then)](const Outcome& outcome,
                                                                             Value value) {
    post([responder, then, outcome, value = std::move(value)]() mutable {
      outcome ? responder.error(*outcome) : then(std::move(value));
    });
  };
}

void Verbs::submit(Request& request) {
  std::vector<PromptRequest> prompts = read_prompts(request.fields);
  check_no_fds(request);
  // Samples are never dropped, so the way to bound them is to take in fewer requests.
  const int64_t held = parts_.delivery.num_held_samples() + parts_.num_pending_samples();
  if (held >= parts_.max_held_samples) {
    throw Error({.code = ErrorCode::kWouldBlock,
                 .field = "samples not taken yet",
                 .value = std::to_string(held),
                 .origin = "submit",
                 .allowed = fmt::format("fewer than {}", parts_.max_held_samples),
                 .message = "take batches, then try again"});
  }
  const auto num_prompts = static_cast<int64_t>(prompts.size());
  parts_.service.submit(std::move(prompts), [this, num_prompts, responder = request.responder](
                                                const Outcome& outcome, int64_t request_id) {
    parts_.in_order_of_samples([=, this] {
      if (outcome) return responder.error(*outcome);
      // Its samples come by way of this thread, so none of them is ahead of this.
      parts_.delivery.expect(request_id, num_prompts);
      reply_when_durable(responder, {{"request_id", request_id}});
    });
  });
}

void Verbs::next_batch(Request& request) {
  const NextBatchRequest wanted = read_next_batch(request.fields);
  check_no_fds(request);
  parts_.waiters.add(
      {.client = request.connection.client,
       .wish = wanted.wish,
       .timeout_ms = wanted.timeout_ms,
       .deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(wanted.timeout_ms),
       .deliver =
           [this, responder = request.responder](const BatchNotice& notice) {
             reply_when_durable(responder, batch_reply(notice));
           },
       .refuse = [responder =
                      request.responder](const ErrorInfo& error) { responder.error(error); }});
}

void Verbs::release(Request& request) {
  const ReleaseRequest released = read_release(request.fields);
  check_no_fds(request);
  parts_.delivery.release(request.connection.client, released.lease, released.batch_seq);
  reply_when_durable(request.responder);
  parts_.waiters.serve();
}

void Verbs::abort(Request& request) {
  const auto request_id = request.fields.optional_integer("request_id", 0, kMaxI64);
  request.fields.finish();
  check_no_fds(request);
  parts_.service.abort(
      request_id, answering<int64_t>(request.responder, [=, this, responder = request.responder](
                                                            int64_t num_aborted) {
        reply_when_durable(responder, {{"num_aborted", num_aborted}});
      }));
}

void Verbs::pause(Request& request) {
  const InFlight in_flight = read_in_flight(request.fields);
  request.fields.finish();
  check_no_fds(request);
  parts_.service.pause(in_flight, [post = parts_.on_server_thread,
                                   responder = request.responder](const Outcome& outcome) {
    post([responder, outcome] { responder.outcome(outcome); });
  });
}

void Verbs::resume(Request& request) {
  request.fields.finish();
  check_no_fds(request);
  parts_.service.resume();
  reply_when_durable(request.responder);
}

void Verbs::sleep(Request& request) {
  const auto level = static_cast<int>(request.fields.integer("level", 1, 2));
  const InFlight in_flight = read_in_flight(request.fields);
  request.fields.finish();
  check_no_fds(request);
  parts_.service.sleep(level, in_flight, sleep_answer(request.responder));
}

void Verbs::wake_up(Request& request) {
  const MemoryTags tags = read_tags(request.fields);
  request.fields.finish();
  check_no_fds(request);
  parts_.service.wake_up(tags, sleep_answer(request.responder));
}

Answer<SleepState> Verbs::sleep_answer(const Responder& responder) const {
  return answering<SleepState>(
      responder, [responder](const SleepState& state) { responder.ok(sleep_reply(state)); });
}

void Verbs::score(Request& request) {
  std::vector<ScoreSequence> sequences = read_sequences(request.fields);
  check_no_fds(request);
  parts_.service.score(std::move(sequences),
                       [post = parts_.on_server_thread, responder = request.responder](
                           const Outcome& outcome, std::vector<ScoredSequence> results) {
                         post([responder, outcome, results = std::move(results)] {
                           outcome ? responder.error(*outcome) : responder.ok(score_reply(results));
                         });
                       });
}

void Verbs::update_weights(Request& request) {
  Fields& fields = request.fields;
  const size_t phase = fields.one_of("phase", {"begin", "chunk", "commit", "cancel"});
  const int64_t version = fields.integer("version", 0, kMaxI64);
  const uint64_t client = request.connection.client;
  const OutcomeCallback answer = [responder = request.responder](const Outcome& outcome) {
    responder.outcome(outcome);
  };
  if (phase == 1) return weight_chunk(request, version);
  check_no_fds(request);
  if (phase == 0) {
    const auto base_version = fields.optional_integer("base_version", 0, kMaxI64);
    fields.finish();
    return parts_.weights.begin(client, {version, base_version}, answer);
  }
  if (phase == 2) {
    const InFlight in_flight = read_in_flight(fields);
    fields.finish();
    return parts_.weights.commit(
        client, version, in_flight, [this, responder = request.responder](const Outcome& outcome) {
          if (outcome) return responder.error(*outcome);
          parts_.service.find_weights(
              answering<WeightsInUse>(responder, [this, responder](const WeightsInUse& weights) {
                reply_when_durable(responder, weights_reply(weights));
              }));
        });
  }
  fields.finish();
  parts_.weights.cancel(client, version);
  request.responder.ok();
}

void Verbs::weight_chunk(Request& request, int64_t version) {
  const uint64_t client = request.connection.client;
  const OutcomeCallback answer = [responder = request.responder](const Outcome& outcome) {
    responder.outcome(outcome);
  };
  if (request.fields.optional_boolean("lent").value_or(false)) {
    ChunkManifest manifest = read_lent_manifest(request.fields);
    request.fields.finish();
    check_no_fds(request);
    auto lender = std::make_shared<const PeerMemory>(request.connection.peer_pid);
    return parts_.weights.lent_chunk(client, version, std::move(manifest), std::move(lender),
                                     answer);
  }
  ChunkManifest manifest = read_manifest(request.fields);
  request.fields.finish();
  if (request.fds.size() != 1) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "num_fds",
                 .value = std::to_string(request.fds.size()),
                 .origin = "update_weights chunk",
                 .allowed = "1, the memfd that holds the tensors"});
  }
  parts_.weights.chunk(client, version, std::move(manifest), std::move(request.fds.front()),
                       answer);
}

void Verbs::get_weight_version(Request& request) {
  request.fields.finish();
  check_no_fds(request);
  parts_.service.find_weights(answering<WeightsInUse>(
      request.responder, [responder = request.responder](const WeightsInUse& weights) {
        responder.ok(weights_reply(weights));
      }));
}

void Verbs::stats(Request& request) {
  request.fields.finish();
  check_no_fds(request);
  using Numbers = RolloutService::Numbers;
  parts_.service.find_stats(answering<Numbers>(
      request.responder, [this, responder = request.responder](const Numbers& of_service) {
        Json stats = Json::object();
        for (const auto& [name, value] : of_service) stats[name] = value;
        for (const auto& [name, value] : numbers()) stats[name] = value;
        responder.ok({{"stats", std::move(stats)}});
      }));
}

std::vector<std::pair<std::string, double>> Verbs::numbers() const {
  auto numbers = parts_.delivery.stats();
  const auto add = [&numbers](const char* name, auto value) {
    numbers.emplace_back(name, static_cast<double>(value));
  };
  add("num_clients", parts_.num_clients());
  add("num_waiting_calls", parts_.waiters.num_waiting());
  add("num_expired_calls", parts_.waiters.num_expired());
  if (parts_.metrics_port) add("metrics_port", *parts_.metrics_port);
  add("num_probs_diff_reports", num_probs_diff_reports_);
  if (num_probs_diff_reports_ == 0) return numbers;  // nothing unknown is ever 0
  add("probs_diff_mean", probs_diff_.mean);
  add("probs_diff_max", probs_diff_.max);
  add("probs_diff_std", probs_diff_.std);
  add("probs_diff_k3_kl", probs_diff_.k3_kl);
  return numbers;
}

void Verbs::report_probs_diff(Request& request) {
  const ProbsDiff diff = read_probs_diff(request.fields);
  check_no_fds(request);
  probs_diff_ = diff;
  ++num_probs_diff_reports_;
  request.responder.ok();
}

void Verbs::health(Request& request) {
  request.fields.finish();
  check_no_fds(request);
  if (const Outcome sick = parts_.health()) throw Error(*sick);
  request.responder.ok({{"status", "ok"}});
}

// For onlookers: without hello they count as no client that has slots, so what becomes of a
// trainer's batches does not depend on who looks.
void Verbs::inspect(Request& request) {
  request.fields.finish();
  check_no_fds(request);
  std::vector<OwnedFd> fds;
  for (const int32_t slot : filled_slots(parts_.slots)) {
    fds.push_back(OwnedFd::duplicate(parts_.slots.fd(slot)));
  }
  request.responder.ok(inspect_reply(parts_.slots), std::move(fds));
}

void Verbs::shutdown(Request& request) {
  request.fields.finish();
  check_no_fds(request);
  request.responder.ok();
  parts_.service.shutdown();
}

}  // namespace rollpack::bridge
