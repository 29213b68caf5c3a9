#include "rollout/journal/journal_log.h"

#include <utility>

#include <fmt/format.h>

#include "kernels/base/error.h"
#include "rollout/journal/frames.h"

namespace rollpack::rollout {
namespace {

// More than any journal gives out between two rewrites.
constexpr int64_t kSkippedNumbers = int64_t{1} << 32;

}  // namespace

JournalLog::JournalLog(std::unique_ptr<JournalStorage> storage, const std::string& maker,
                       std::string instance)
    : storage_(std::move(storage)), header_{std::move(instance), maker} {
  const std::string bytes = storage_->read();
  const Frames frames = read_frames(bytes);
  size_t num_good = 0, num_good_bytes = 0;
  std::string complaint;
  try {
    for (const std::string_view frame : frames.records) {
      Record record = decode_record(frame);
      const bool is_header = std::holds_alternative<record::Header>(record);
      if (num_good == 0 && is_header) {
        header_ = std::get<record::Header>(std::move(record));
      } else if (num_good == 0) {
        break;
      } else {
        live_.apply(std::move(record));
      }
      ++num_good;
      num_good_bytes += kFrameHeadBytes + frame.size();
    }
  } catch (const Error&) {
    // A record that is whole and says what cannot be: the run of valid ones ends before it.
  }
  if (!bytes.empty() && num_good == 0) {
    throw Error({.code = ErrorCode::kDataLoss,
                 .field = "cluster.journal",
                 .value = fmt::format("{} bytes that do not begin as a journal", bytes.size()),
                 .allowed = "a journal of rollpack's, or no file",
                 .message = "move it away to begin a new one"});
  }
  num_cut_bytes_ = static_cast<int64_t>(bytes.size() - num_good_bytes);
  if (num_cut_bytes_ > 0) live_.skip_numbers(kSkippedNumbers);
  if (header_.maker != maker) {
    if (live_.num_groups() > 0) {
      throw Error({.code = ErrorCode::kFailedPrecondition,
                   .field = "cluster.journal",
                   .value = fmt::format("written by {}", header_.maker),
                   .allowed = maker,
                   .message = fmt::format("its {} open groups would get other bits: run what wrote "
                                          "it, or move it away",
                                          live_.num_groups())});
    }
    header_.maker = maker;
  }
  rewrite();
}

bridge::RestoredDelivery JournalLog::restored_delivery(int32_t node) const {
  bridge::RestoredDelivery restored = live_.delivery(node);
  restored.instance = header_.instance;
  if (node > 0) restored.instance += fmt::format("-{}", node);
  return restored;
}

void JournalLog::append(Record record) {
  append_frame(pending_, encode(record), num_frames_);
  live_.apply(std::move(record));
  ++num_frames_;
}

void JournalLog::commit() {
  if (pending_.empty()) return;
  num_bytes_ += static_cast<int64_t>(pending_.size());
  if (num_bytes_ > kMinRewriteBytes && num_bytes_ > 2 * live_.num_bytes()) return rewrite();
  storage_->append(pending_);
  storage_->sync();
  pending_.clear();
}

// What is pending is in the live set already.
void JournalLog::rewrite() {
  std::string bytes;
  num_frames_ = 0;
  append_frame(bytes, encode(header_), num_frames_++);
  for (const Record& record : live_.records()) append_frame(bytes, encode(record), num_frames_++);
  storage_->replace(bytes);
  num_bytes_ = static_cast<int64_t>(bytes.size());
  pending_.clear();
  ++num_rewrites_;
}

}  // namespace rollpack::rollout
