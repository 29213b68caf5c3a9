// What a rank says of itself, as snapshots hold it.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>

namespace rollpack::rollout {

inline std::shared_ptr<const std::map<std::string, double>> numbers(
    std::map<std::string, double> values) {
  return std::make_shared<const std::map<std::string, double>>(std::move(values));
}

}  // namespace rollpack::rollout
