// One run over a whole workload, timed and measured.
#pragma once

#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "rollout/bench/workload.h"
#include "rollout/cluster/job.h"
#include "rollout/command/end_signal.h"
#include "trainer_bridge/contract/sample_sink.h"

namespace rollpack::rollout {

struct Pass {
  double wall_s = 0;                       // from submitting to the last sample
  Measurement measured;                    // of all ranks
  std::vector<double> first_token_s;       // of each sample, from submitting
  std::map<std::string, double> counters;  // by how much the workers' counters rose
  double peak_memory_bytes = 0;            // resident, all ranks, since the job was made ready

  int64_t counter(const std::string& name) const;
  int64_t tokens_computed() const { return counter("num_rows_computed"); }  // pads included
};

// Runs passes on a job, one at a time. Ends early by a signal.
class PassRunner : private bridge::SampleSink {
 public:
  // Starts the job. Errors: those of Job::start().
  explicit PassRunner(Job& job);

  // One pass under the batching mode `batching`. It finds no prompt of an earlier pass in a cache:
  // what a pass has to compute, and so its share of the roofline, is the same in all of them.
  // nullopt: a signal came; status() is what the program exits with.
  // Errors: whatever broke the job or failed a sample.
  std::optional<Pass> run(const Workload& workload, const std::string& batching);
  int status() const { return end_.status(); }

 private:
  void commit(bridge::Sample) override { count(std::nullopt); }
  void fail(bridge::FailedSample sample) override { count(std::move(sample.error)); }
  void count(bridge::Outcome error);
  template <class Done>
  bool wait(Done done);
  bool start_measuring(const std::string& batching);
  std::optional<Measurement> take_measurement();

  Job& job_;
  EndSignal end_;
  mutable std::mutex mutex_;  // of the members below
  int64_t num_done_ = 0;
  bridge::Outcome error_;
  std::optional<Measurement> measurement_;
  bool is_measuring_ = false;  // every worker does, with empty caches
};

}  // namespace rollpack::rollout
