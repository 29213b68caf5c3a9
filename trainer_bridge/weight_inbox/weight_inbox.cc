#include "trainer_bridge/weight_inbox/weight_inbox.h"

#include <fmt/format.h>

#include <utility>

#include "kernels/base/error.h"
#include "trainer_bridge/shared_memory/peer_memory.h"

namespace rollpack::bridge {
namespace {

ErrorInfo out_of_order(std::string value, std::string allowed, std::string message) {
  return {.code = ErrorCode::kFailedPrecondition,
          .field = "update_weights",
          .value = std::move(value),
          .allowed = std::move(allowed),
          .message = std::move(message)};
}

}  // namespace

WeightInbox::WeightInbox(RolloutService& service, Runner background, Runner foreground)
    : service_(service), background_(std::move(background)), foreground_(std::move(foreground)) {}

const char* WeightInbox::name_of(Kind kind) {
  switch (kind) {
    case Kind::kBegin:
      return "begin";
    case Kind::kChunk:
      return "chunk";
    case Kind::kCommit:
      return "commit";
  }
  return "";
}

void WeightInbox::check_owner(const char* phase, uint64_t client, int64_t version) const {
  if (!update_) throw Error(out_of_order(phase, "begin first", "no update is under way"));
  if (update_->client != client) {
    throw Error(out_of_order(
        phase, "its own client only",
        fmt::format("another client's update to version {} is under way", update_->version)));
  }
  if (update_->version != version) {
    throw Error(
        {.code = ErrorCode::kFailedPrecondition,
         .field = "version",
         .value = std::to_string(version),
         .origin = fmt::format("update_weights {}", phase),
         .allowed = fmt::format("{}, the version of the update under way", update_->version)});
  }
  if (update_->is_committing) {
    throw Error(out_of_order(phase, "nothing until the commit is answered",
                             "this update is being committed"));
  }
}

void WeightInbox::begin(uint64_t client, WeightUpdate update, OutcomeCallback done) {
  if (update_) {
    return done(
        out_of_order("begin", "one update at a time",
                     fmt::format("an update to version {} is under way", update_->version)));
  }
  const int64_t current = service_.weight_version();
  if (update.version <= current) {
    return done(ErrorInfo{.code = ErrorCode::kInvalidArgument,
                          .field = "version",
                          .value = std::to_string(update.version),
                          .origin = "update_weights begin",
                          .allowed = fmt::format("above {}, the current version", current)});
  }
  if (update.base_version && *update.base_version != current) {
    return done(ErrorInfo{
        .code = ErrorCode::kInvalidArgument,
        .field = "base_version",
        .value = std::to_string(*update.base_version),
        .origin = "update_weights begin",
        .allowed = fmt::format("{}, the current version", current),
        .message = "send every tensor, or the difference to the weights that are current"});
  }
  update_ = Update{.client = client, .version = update.version};
  ++update_serial_;
  enqueue({Kind::kBegin,
           [this, update](const OutcomeCallback& end) { service_.begin_weights(update, end); },
           std::move(done)});
}

void WeightInbox::chunk(uint64_t client, int64_t version, ChunkManifest manifest, OwnedFd fd,
                        OutcomeCallback done) {
  auto shared_fd = std::make_shared<OwnedFd>(std::move(fd));  // std::function wants copies
  enqueue_chunk(
      client, version,
      [this, manifest = std::move(manifest), shared_fd](const OutcomeCallback& end) {
        stage(manifest, shared_fd, end);
      },
      std::move(done));
}

void WeightInbox::lent_chunk(uint64_t client, int64_t version, ChunkManifest manifest,
                             std::shared_ptr<const PeerMemory> lender, OutcomeCallback done) {
  enqueue_chunk(
      client, version,
      [this, manifest = std::move(manifest), lender](const OutcomeCallback& end) {
        stage_lent(manifest, lender, end);
      },
      std::move(done));
}

void WeightInbox::enqueue_chunk(uint64_t client, int64_t version,
                                std::function<void(const OutcomeCallback&)> run,
                                OutcomeCallback done) {
  try {
    check_owner("chunk", client, version);
    if (update_->num_ahead >= kMaxPhasesAhead) {
      throw Error({.code = ErrorCode::kWouldBlock,
                   .field = "update_weights",
                   .value = "chunk",
                   .allowed = fmt::format("{} phases ahead of their replies", kMaxPhasesAhead),
                   .message = "wait for a reply"});
    }
  } catch (const Error& error) {
    return done(error.info);
  }
  ++update_->num_ahead;
  enqueue({Kind::kChunk, std::move(run), std::move(done)});
}

void WeightInbox::commit(uint64_t client, int64_t version, InFlight in_flight,
                         OutcomeCallback done) {
  try {
    check_owner("commit", client, version);
  } catch (const Error& error) {
    return done(error.info);
  }
  enqueue({Kind::kCommit,
           [this, in_flight](const OutcomeCallback& end) {
             update_->is_committing = true;
             service_.commit_weights(in_flight, end);
           },
           std::move(done)});
}

void WeightInbox::cancel(uint64_t client, int64_t version) {
  check_owner("cancel", client, version);
  service_.cancel_weights();
  close("the update was cancelled");
}

void WeightInbox::client_gone(uint64_t client) {
  if (!update_ || update_->client != client || update_->is_committing) return;
  service_.cancel_weights();
  close("its client has gone");
}

void WeightInbox::enqueue(Phase phase) {
  waiting_.push_back(std::move(phase));
  run_next();
}

void WeightInbox::run_next() {
  if (is_busy_ || waiting_.empty()) return;
  const bool is_chunk = waiting_.front().kind == Kind::kChunk;
  if (!is_chunk && num_staging_ > 0) return;
  is_busy_ = true;
  if (is_chunk) ++num_staging_;
  Phase phase = std::move(waiting_.front());
  waiting_.pop_front();
  // The service answers on any thread; the runner is copied so that a late answer finds it.
  const OutcomeCallback end = [this, foreground = foreground_, serial = update_serial_,
                               kind = phase.kind, done = phase.done](Outcome outcome) {
    foreground([this, serial, kind, done, outcome = std::move(outcome)] {
      phase_ended(serial, kind, done, outcome);
    });
  };
  try {
    phase.run(end);
  } catch (const Error& error) {
    end(error.info);
  }
}

void WeightInbox::phase_ended(uint64_t update_serial, Kind kind, const OutcomeCallback& done,
                              Outcome outcome) {
  if (kind == Kind::kChunk) {
    --num_staging_;  // the next phase started when it reached the service
  } else {
    is_busy_ = false;
  }
  const bool is_current = update_ && update_serial == update_serial_;
  if (is_current && kind == Kind::kChunk) --update_->num_ahead;
  if (!is_current && !outcome) {
    outcome =
        out_of_order(name_of(kind), "an update that goes on", "the update was cancelled meanwhile");
  }
  if (is_current && outcome) close("a phase before it was refused");
  if (is_current && kind == Kind::kCommit && !outcome) update_.reset();
  done(std::move(outcome));
  run_next();
}

void WeightInbox::stage(ChunkManifest manifest, const std::shared_ptr<OwnedFd>& fd,
                        const OutcomeCallback& done) {
  try {
    check_new_names(manifest);
  } catch (const Error& error) {
    return refuse_chunk(update_serial_, error.info, done);
  }
  background_([this, manifest = std::move(manifest), fd, foreground = foreground_,
               serial = update_serial_, done] {
    std::shared_ptr<ReceivedChunk> chunk;
    std::optional<ErrorInfo> failure;
    try {
      chunk = std::make_shared<ReceivedChunk>(manifest, std::move(*fd));
    } catch (const Error& error) {
      failure = error.info;
    }
    foreground([this, chunk, failure, serial, done] {
      if (failure) return refuse_chunk(serial, *failure, done);
      is_busy_ = false;
      if (!update_ || serial != update_serial_) return done(std::nullopt);  // cancelled meanwhile
      // The callback holds the mapping until the service has answered.
      service_.stage_weights(chunk->view(),
                             [chunk, done](Outcome outcome) { done(std::move(outcome)); });
      run_next();
    });
  });
}

void WeightInbox::stage_lent(const ChunkManifest& manifest,
                             std::shared_ptr<const PeerMemory> lender,
                             const OutcomeCallback& done) {
  WeightChunk chunk{.lender = std::move(lender)};
  try {
    check_new_names(manifest);
    if (!service_.takes_lent_weights() || !chunk.lender->is_known()) {
      throw Error({.code = ErrorCode::kUnsupported,
                   .field = "lent",
                   .value = "true",
                   .origin = "update_weights chunk",
                   .allowed = "a memfd, as hello says"});
    }
  } catch (const Error& error) {
    return refuse_chunk(update_serial_, error.info, done);
  }
  for (const TensorEntry& tensor : manifest.tensors) {
    chunk.tensors.push_back({.name = tensor.name,
                             .dtype = tensor.dtype,
                             .shape = tensor.shape,
                             .address = tensor.address});
  }
  is_busy_ = false;
  service_.stage_weights(std::move(chunk), done);
  run_next();
}

void WeightInbox::refuse_chunk(uint64_t update_serial, const ErrorInfo& error,
                               const OutcomeCallback& done) {
  is_busy_ = false;
  if (update_ && update_serial == update_serial_) service_.cancel_weights();
  done(error);
}

void WeightInbox::check_new_names(const ChunkManifest& manifest) {
  for (const TensorEntry& tensor : manifest.tensors) {
    if (update_->names.insert(tensor.name).second) continue;
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "name",
                 .value = tensor.name,
                 .origin = "update_weights chunk",
                 .allowed = "each tensor once in an update"});
  }
}

void WeightInbox::close(const std::string& why) {
  update_.reset();
  for (const Phase& phase : std::exchange(waiting_, {})) {
    phase.done(out_of_order(name_of(phase.kind), "begin first", why));
  }
}

}  // namespace rollpack::bridge
