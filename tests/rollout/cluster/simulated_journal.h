// The journal of a simulated rank 0: on disk when the dice say so, cut where a crash leaves it.
#pragma once

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/base/error.h"
#include "rollout/journal/journal_log.h"
#include "tests/rollout/cluster/simulated_world.h"
#include "tests/rollout/journal/memory_storage.h"

namespace rollpack::rollout::simulation {

class SimulatedJournal final : public RequestLog, public bridge::DeliveryLog {
 public:
  SimulatedJournal(World& world, std::shared_ptr<testing::Disk> disk)
      : world_(world),
        disk_(std::move(disk)),
        log_(std::make_unique<testing::MemoryStorage>(disk_), "simulation", "journal") {}

  const JournalLog& log() const { return log_; }

  void accepted(int64_t request_id, std::vector<AcceptedGroup> groups) override {
    record::Accepted record{.request_id = request_id};
    for (AcceptedGroup& group : groups) record.groups.push_back({.accepted = std::move(group)});
    append(std::move(record));
  }
  void aborted(std::optional<int64_t> request_id) override { append(record::Aborted{request_id}); }
  void switched(int64_t weight_version) override { append(record::Switched{weight_version}); }
  void formed(std::vector<bridge::FormedBatch> batches) override {
    append(record::Formed{std::move(batches)});
  }
  void released(uint64_t batch_seq) override { append(record::Released{batch_seq}); }
  void when_durable(std::function<void(std::optional<ErrorInfo>)> done) override {
    if (!is_dirty_) return done(std::nullopt);
    waiting_.push_back(std::move(done));
  }

  void sync() {
    log_.commit();
    is_dirty_ = false;
    for (const auto& done : std::exchange(waiting_, {})) done(std::nullopt);
  }

  // The process is gone, perhaps while it wrote; nobody is told of anything any more.
  void crash() {
    waiting_.clear();
    if (!is_dirty_ || world_.dice.chance(0.5)) return;
    disk_->max_bytes = disk_->synced.size() + static_cast<size_t>(world_.dice.below(400));
    try {
      log_.commit();
    } catch (const Error&) {
      world_.fault(Fault::kTornJournal);
    }
    disk_->max_bytes = size_t{1} << 40;
    disk_->lose_power(disk_->unsynced.size());
  }

 private:
  void append(Record record) {
    log_.append(std::move(record));
    is_dirty_ = true;
  }

  World& world_;
  std::shared_ptr<testing::Disk> disk_;
  JournalLog log_;
  bool is_dirty_ = false;
  std::vector<std::function<void(std::optional<ErrorInfo>)>> waiting_;
};

}  // namespace rollpack::rollout::simulation
