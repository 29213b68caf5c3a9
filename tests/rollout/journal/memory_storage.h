// A journal's storage in memory: it can run full, fail to sync, and lose power.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "kernels/base/error.h"
#include "rollout/journal/storage.h"

namespace rollpack::rollout::testing {

// What outlives the one who writes it.
struct Disk {
  std::string synced;
  std::string unsynced;  // behind it
  size_t max_bytes = size_t{1} << 40;
  bool sync_fails = false;
  int num_syncs = 0;
  int num_calls_after_failure = 0;
  bool has_failed = false;

  // Some of what was not synced is there, the last byte of it perhaps another.
  void lose_power(size_t num_unsynced_left) {
    synced += unsynced.substr(0, num_unsynced_left);
    unsynced.clear();
    has_failed = false;
  }
};

class MemoryStorage final : public JournalStorage {
 public:
  explicit MemoryStorage(std::shared_ptr<Disk> disk) : disk_(std::move(disk)) {}

  std::string read() override { return disk_->synced + disk_->unsynced; }
  void append(std::string_view bytes) override {
    check();
    const size_t room = disk_->max_bytes - disk_->synced.size() - disk_->unsynced.size();
    disk_->unsynced += bytes.substr(0, room);  // a short write first, as a file has it
    if (bytes.size() > room) fail(ErrorCode::kResourceExhausted, "no space left");
  }
  void sync() override {
    check();
    ++disk_->num_syncs;
    if (disk_->sync_fails) fail(ErrorCode::kUnavailable, "input/output error");
    disk_->synced += std::exchange(disk_->unsynced, {});
  }
  void replace(std::string_view bytes) override {
    check();
    if (bytes.size() > disk_->max_bytes) fail(ErrorCode::kResourceExhausted, "no space left");
    disk_->synced = bytes;
    disk_->unsynced.clear();
  }

 private:
  void check() {
    if (disk_->has_failed) ++disk_->num_calls_after_failure;
  }
  [[noreturn]] void fail(ErrorCode code, const char* what) {
    disk_->has_failed = true;
    throw Error({.code = code, .field = "cluster.journal", .message = what});
  }

  std::shared_ptr<Disk> disk_;
};

}  // namespace rollpack::rollout::testing
