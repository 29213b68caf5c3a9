// Every metric, listed once: its name, the number it shows, and what that means. A metric that
// means what vLLM's of that name means is called as there, with the prefix `rollpack:`.
#pragma once

#include <string>
#include <vector>

#include <prometheus/metric_family.h>

#include "rollout/metrics/health.h"
#include "rollout/metrics/snapshot.h"

namespace rollpack::rollout {

// What does not change while a job runs; labels of rollpack:info.
struct JobLabels {
  std::string model_name;
  std::string dtype;
  std::string batching;
};

std::vector<prometheus::MetricFamily> metric_families(const Snapshot& snapshot,
                                                      const Health& health,
                                                      const JobLabels& labels);

// In Prometheus' text format 0.0.4.
std::string metrics_text(const std::vector<prometheus::MetricFamily>& families);

}  // namespace rollpack::rollout
