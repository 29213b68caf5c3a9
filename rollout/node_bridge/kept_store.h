// Samples that ranks have handed to this node's bridge, from then until rank 0 has said whether
// they count. Sample and verdict come by different ways and may overtake each other.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <tuple>

#include "rollout/cluster/kept_samples.h"
#include "trainer_bridge/contract/sample_sink.h"

namespace rollpack::rollout {

// Thread-safe.
class KeptStore {
 public:
  // What counts goes to `sink`, which outlives this.
  explicit KeptStore(bridge::SampleSink& sink) : sink_(sink) {}

  void keep(int32_t worker, int32_t attempt, bridge::Sample sample);
  void decide(int32_t worker, const bridge::SampleKey& key, int32_t attempt, Verdict verdict);
  // Rank 0 has given `worker` up: no verdict but kDrop follows for what has none yet.
  void forget(int32_t worker);
  // A connection of `worker` begins or ends. After its last one nothing more comes: what counts and
  // has not come fails, with data_loss.
  void begin(int32_t worker);
  void end(int32_t worker);

  int64_t num_samples() const;  // without a verdict
  int64_t num_dropped() const;

 private:
  // Request, prompt, sample, attempt: no two samples have the same.
  using Name = std::tuple<int64_t, int32_t, int32_t, int32_t>;
  struct Kept {
    int32_t worker = 0;
    bridge::Sample sample;
  };
  struct Decided {
    int32_t worker = 0;
    bridge::SampleKey key;
    Verdict verdict = Verdict::kDrop;
  };

  static Name name_of(const bridge::SampleKey& key, int32_t attempt) {
    return {key.request_id, key.prompt_index, key.sample_index, attempt};
  }
  bool has_ended(int32_t worker) const;
  void carry_out(Verdict verdict, bridge::Sample sample);
  void lose(const Decided& decided);

  bridge::SampleSink& sink_;
  mutable std::mutex mutex_;
  std::map<Name, Kept> kept_;
  std::map<Name, Decided> decided_;             // ahead of their samples
  std::map<int32_t, int32_t> num_connections_;  // by worker; 0: the last one has ended
  std::set<int32_t> forgotten_;
  int64_t num_dropped_ = 0;
};

}  // namespace rollpack::rollout
