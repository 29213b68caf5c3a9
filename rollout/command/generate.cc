#include <algorithm>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>

#include "kernels/base/error.h"
#include "rollout/command/command.h"
#include "rollout/command/end_signal.h"
#include "rollout/command/progress.h"
#include "rollout/jsonl/readers.h"
#include "rollout/jsonl/whole_file.h"
#include "rollout/jsonl/writers.h"
#include "trainer_bridge/contract/sample_sink.h"

namespace rollpack::rollout {
namespace {

// Prompts of one submit: large enough that dispatch has groups of all lengths to choose from, small
// enough that a file of millions of prompts is never queued as a whole.
constexpr size_t kPromptsPerSubmit = 1024;

// Writes samples in the order of the prompts in the file, whatever order they are made in; what is
// early waits here.
class OrderedLines : public bridge::SampleSink {
 public:
  OrderedLines(const std::vector<bridge::PromptRequest>& prompts, int32_t default_n,
               const std::string& path, EndSignal& end)
      : file_(path), end_(end) {
    for (const bridge::PromptRequest& prompt : prompts) {
      index_of_[prompt.prompt_id->text] = static_cast<int64_t>(num_samples_of_.size());
      num_samples_of_.push_back(prompt.n.value_or(default_n));
      num_total_ += num_samples_of_.back();
    }
  }

  void commit(bridge::Sample sample) override { take(sample.key, sample_line(sample), false); }
  void fail(bridge::FailedSample sample) override { take(sample.key, failed_line(sample), true); }

  int64_t num_done() const {
    const std::lock_guard lock(mutex_);
    return num_done_;
  }
  int64_t num_failed() const {
    const std::lock_guard lock(mutex_);
    return num_failed_;
  }
  int64_t num_total() const { return num_total_; }

  // Writes what is left (a run that was ended early has holes) and makes the file appear.
  void close() {
    const std::lock_guard lock(mutex_);
    for (const auto& [index, lines] : waiting_) {
      for (const auto& [sample_index, line] : lines) file_.write(line);
    }
    file_.commit();
  }

 private:
  void take(const bridge::SampleKey& key, std::string line, bool failed) {
    {
      const std::lock_guard lock(mutex_);
      ++num_done_;
      num_failed_ += failed;
      const int64_t index = index_of_.at(key.prompt_id.text);
      waiting_[index].emplace(key.sample_index, std::move(line));
      while (!waiting_.empty() && waiting_.begin()->first == next_ &&
             static_cast<int32_t>(waiting_.begin()->second.size()) == num_samples_of_[next_]) {
        for (const auto& [sample_index, text] : waiting_.begin()->second) file_.write(text);
        waiting_.erase(waiting_.begin());
        ++next_;
      }
    }
    end_.notify();
  }

  WholeFile file_;
  EndSignal& end_;
  std::unordered_map<std::string, int64_t> index_of_;
  std::vector<int32_t> num_samples_of_;
  int64_t num_total_ = 0;

  mutable std::mutex mutex_;
  std::map<int64_t, std::map<int32_t, std::string>> waiting_;  // by prompt, then sample
  int64_t next_ = 0;                                           // the prompt whose lines come next
  int64_t num_done_ = 0;
  int64_t num_failed_ = 0;
};

// Submits prompts [begin, end) once there is room for them; false when the run is to end.
bool submit_when_room(Dispatcher& dispatcher, const OrderedLines& lines, EndSignal& end,
                      std::vector<bridge::PromptRequest> prompts) {
  for (;;) {
    const int64_t num_done = lines.num_done();
    try {
      dispatcher.submit(prompts);
      return true;
    } catch (const Error& error) {
      if (error.info.code != ErrorCode::kWouldBlock) throw;
    }
    if (end.wait([&] { return lines.num_done() > num_done; })) return false;
  }
}

}  // namespace

int generate(Job& job, const CommandLine& line) {
  std::vector<bridge::PromptRequest> prompts = read_prompts(line.input);
  EndSignal end;
  OrderedLines lines(prompts, job.config().rollout.n, line.output, end);
  Dispatcher& dispatcher = job.dispatcher();
  dispatcher.set_sink(lines);
  dispatcher.set_on_end([&end] { end.raise(1); });
  job.start();
  Progress progress("samples", lines.num_total());
  for (size_t begin = 0; begin < prompts.size(); begin += kPromptsPerSubmit) {
    const size_t last = std::min(prompts.size(), begin + kPromptsPerSubmit);
    std::vector<bridge::PromptRequest> some(std::make_move_iterator(prompts.begin() + begin),
                                            std::make_move_iterator(prompts.begin() + last));
    if (!submit_when_room(dispatcher, lines, end, std::move(some))) break;
  }
  const bool ended_early = end.wait([&] {
    progress.show(lines.num_done());
    return lines.num_done() == lines.num_total();
  });
  const bridge::Outcome broken = dispatcher.health();
  job.stop(/*hand_back=*/ended_early && !broken);
  if (broken) throw Error(*broken);
  lines.close();
  if (ended_early) return end.status();
  return lines.num_failed() > 0 ? 1 : 0;
}

}  // namespace rollpack::rollout
