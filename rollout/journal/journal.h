// The journal of a serving job: what requests and deliveries write down, on disk by a thread of its
// own. Whatever came while one write was under way goes with the next: one sync for all of it, and
// nobody who writes something down waits for a disk.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "rollout/journal/journal_log.h"

namespace rollpack::rollout {

class Journal final : public RequestLog, public bridge::DeliveryLog {
 public:
  // The journal file at `path`; errors as JournalFile() and JournalLog().
  // `num_nodes` have a bridge. Errors also: failed_precondition where a bridge of further ones has
  // something left.
  static std::unique_ptr<Journal> open(const std::string& path, const std::string& maker,
                                       int32_t num_nodes = 1);

  explicit Journal(JournalLog log, int32_t num_nodes = 1);
  // Writes what is left.
  ~Journal() override;

  // What was left when it was opened.
  const RestoredRequests& restored_requests() const { return requests_; }
  const bridge::RestoredDelivery& restored_delivery(int32_t node = 0) const {
    return deliveries_.at(static_cast<size_t>(node));
  }

  // Called once, on the journal's thread, when the disk failed: nothing is written from then on.
  // Before the first record.
  void set_on_failure(std::function<void(ErrorInfo)> on_failure) {
    on_failure_ = std::move(on_failure);
  }

  // Any thread, never waiting for the disk.
  void accepted(int64_t request_id, std::vector<AcceptedGroup> groups) override;
  void aborted(std::optional<int64_t> request_id) override;
  void switched(int64_t weight_version) override;
  void formed(std::vector<bridge::FormedBatch> batches) override {
    formed_at(0, std::move(batches));
  }
  void released(uint64_t batch_seq) override { released_at(0, batch_seq); }
  // The same of another node's bridge, which counts for itself.
  void formed_at(int32_t node, std::vector<bridge::FormedBatch> batches);
  void released_at(int32_t node, uint64_t batch_seq);
  void when_durable(std::function<void(std::optional<ErrorInfo>)> done) override;

 private:
  using Done = std::function<void(std::optional<ErrorInfo>)>;

  void put(Record record);
  void run();
  void write(std::vector<std::variant<Record, Done>> entries);

  RestoredRequests requests_;
  std::vector<bridge::RestoredDelivery> deliveries_;  // by node
  JournalLog log_;                                    // the thread's
  std::function<void(ErrorInfo)> on_failure_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::variant<Record, Done>> queue_;
  bool is_writing_ = false;
  bool is_ending_ = false;
  std::optional<ErrorInfo> failure_;
  std::thread thread_;
};

}  // namespace rollpack::rollout
