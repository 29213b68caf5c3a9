// Where rollout puts what it has made. Implemented by trainer_bridge's server (batches for a
// trainer) and by the command line (a file).
#pragma once

#include "trainer_bridge/contract/sample.h"

namespace rollpack::bridge {

class SampleSink {
 public:
  virtual ~SampleSink() = default;

  // Thread-safe and never blocking. Every accepted (request, prompt, sample) arrives exactly once,
  // as one of the two.
  virtual void commit(Sample sample) = 0;
  virtual void fail(FailedSample sample) = 0;
};

}  // namespace rollpack::bridge
