// A journal in a storage: what is live, and records appended to it. One thread; journal.h has it
// behind one of its own.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "rollout/journal/live_set.h"
#include "rollout/journal/storage.h"

namespace rollpack::rollout {

class JournalLog {
 public:
  // Below this a rewrite saves nothing that counts.
  static constexpr int64_t kMinRewriteBytes = int64_t{1} << 20;

  // Reads the longest valid run of records and rewrites the journal to what lives of it.
  // `maker` names what decides a sample's bits; `instance`: of a new journal.
  // Errors: data_loss for bytes that do not begin as a journal; failed_precondition for one of
  // another maker in which something lives; those of the storage.
  JournalLog(std::unique_ptr<JournalStorage> storage, const std::string& maker,
             std::string instance);

  const LiveSet& live() const { return live_; }
  const std::string& instance() const { return header_.instance; }
  // Bytes after the last valid record that were cut off; then numbers were skipped too.
  int64_t num_cut_bytes() const { return num_cut_bytes_; }
  // Of a node's bridge; what it names as its instance is that bridge's alone.
  bridge::RestoredDelivery restored_delivery(int32_t node = 0) const;

  // Takes a record in; it is on disk after commit().
  // Errors: as LiveSet::apply().
  void append(Record record);
  // One write and one sync for all that was appended; rewrites the journal where more than half of
  // it is of the past. After an error nothing may be called again.
  void commit();

  int64_t num_bytes() const { return num_bytes_; }        // of the file
  int64_t num_rewrites() const { return num_rewrites_; }  // the first one included

 private:
  void rewrite();

  std::unique_ptr<JournalStorage> storage_;
  record::Header header_;
  LiveSet live_;
  std::string pending_;  // frames
  uint64_t num_frames_ = 0;
  int64_t num_bytes_ = 0;
  int64_t num_rewrites_ = 0;
  int64_t num_cut_bytes_ = 0;
};

}  // namespace rollpack::rollout
