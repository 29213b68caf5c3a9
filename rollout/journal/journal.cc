#include "rollout/journal/journal.h"

#include <random>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

std::string new_instance() {
  std::random_device random;
  return fmt::format("{:08x}{:08x}", random(), random());
}

}  // namespace

std::unique_ptr<Journal> Journal::open(const std::string& path, const std::string& maker,
                                       int32_t num_nodes) {
  JournalLog log(std::make_unique<JournalFile>(path), maker, new_instance());
  spdlog::info("journal {}: {} open groups, {} batches not released, weight version {}", path,
               log.live().num_groups(), log.live().num_batches(),
               log.live().counters().weight_version);
  if (log.num_cut_bytes() > 0) {
    spdlog::warn("journal {}: its last {} bytes were no whole record and are cut off", path,
                 log.num_cut_bytes());
  }
  return std::make_unique<Journal>(std::move(log), num_nodes);
}

Journal::Journal(JournalLog log, int32_t num_nodes)
    : requests_(log.live().requests()), log_(std::move(log)) {
  if (const int32_t last = log_.live().last_node(); last >= num_nodes) {
    throw Error({.code = ErrorCode::kFailedPrecondition,
                 .field = "cluster.journal",
                 .value = fmt::format("something left for the bridge of node {}", last),
                 .allowed = fmt::format("nodes 0 to {}, which have a bridge", num_nodes - 1),
                 .message =
                     "start it on as many hosts as before, with bridge.endpoints = per_node, "
                     "or move it away"});
  }
  for (int32_t node = 0; node < num_nodes; ++node) {
    deliveries_.push_back(log_.restored_delivery(node));
  }
  thread_ = std::thread([this] { run(); });
}

Journal::~Journal() {
  {
    const std::lock_guard lock(mutex_);
    is_ending_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Journal::accepted(int64_t request_id, std::vector<AcceptedGroup> groups) {
  record::Accepted record{.request_id = request_id};
  const int32_t node = groups.empty() ? 0 : groups.front().request.key.node;
  record.groups.reserve(groups.size());
  for (AcceptedGroup& group : groups) record.groups.push_back({.accepted = std::move(group)});
  if (node > 0) return put(record::NodeAccepted{node, std::move(record)});
  put(std::move(record));
}

void Journal::aborted(std::optional<int64_t> request_id) {
  put(record::Aborted{request_id});
}

void Journal::switched(int64_t weight_version) {
  put(record::Switched{weight_version});
}

void Journal::formed_at(int32_t node, std::vector<bridge::FormedBatch> batches) {
  for (bridge::FormedBatch& batch : batches) {
    batch.batch_seq = record::at_node(node, batch.batch_seq);
    if (batch.step > 0) batch.step = record::at_node(node, batch.step);
  }
  put(record::Formed{std::move(batches)});
}

void Journal::released_at(int32_t node, uint64_t batch_seq) {
  put(record::Released{record::at_node(node, batch_seq)});
}

void Journal::put(Record record) {
  {
    const std::lock_guard lock(mutex_);
    if (failure_) return;
    queue_.emplace_back(std::move(record));
  }
  changed_.notify_all();
}

void Journal::when_durable(Done done) {
  std::optional<ErrorInfo> failure;
  {
    const std::lock_guard lock(mutex_);
    failure = failure_;
    if (!failure && (is_writing_ || !queue_.empty())) {
      queue_.emplace_back(std::move(done));
      return;
    }
  }
  done(std::move(failure));
}

void Journal::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return is_ending_ || !queue_.empty(); });
    if (queue_.empty()) return;
    auto entries = std::exchange(queue_, {});
    is_writing_ = true;
    lock.unlock();
    write(std::move(entries));
    lock.lock();
    is_writing_ = false;
  }
}

// What fails once has failed for good: after a failed sync nobody knows what is on disk, and a
// second one that succeeds says nothing of the first.
void Journal::write(std::vector<std::variant<Record, Done>> entries) {
  std::vector<Done> waiting;
  std::optional<ErrorInfo> failure;
  {
    const std::lock_guard lock(mutex_);
    failure = failure_;
  }
  const bool has_failed_before = failure.has_value();
  try {
    for (auto& entry : entries) {
      if (auto* done = std::get_if<Done>(&entry)) {
        waiting.push_back(std::move(*done));
      } else if (!failure) {
        log_.append(std::move(std::get<Record>(entry)));
      }
    }
    if (!failure) log_.commit();
  } catch (const Error& error) {
    failure = error.info;
    for (auto& entry : entries) {
      auto* done = std::get_if<Done>(&entry);
      if (done != nullptr && *done) waiting.push_back(std::move(*done));
    }
  }
  if (failure && !has_failed_before) {
    {
      const std::lock_guard lock(mutex_);
      failure_ = failure;
    }
    spdlog::error("the journal ends here: {}", format_error(*failure));
    if (on_failure_) on_failure_(*failure);
  }
  for (const Done& done : waiting) done(failure);
}

}  // namespace rollpack::rollout
