// Batching modes side by side: the table of the Prepacking paper, on our side.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "rollout/bench/report.h"

namespace rollpack::rollout {

// The passes of each mode, in the order they were asked for.
using ModePasses = std::vector<std::pair<std::string, std::vector<Pass>>>;

// One object a mode: seconds, tokens computed, memory used (KV pages and activations), and over
// each of the baselines left_padded and length_sorted that ran: the gain in seconds, the bound that
// the tokens computed set to it, and the share of that bound.
nlohmann::ordered_json comparison_report(const ModePasses& modes, const BenchSetting& setting);
std::string comparison_table(const nlohmann::ordered_json& comparison);

}  // namespace rollpack::rollout
