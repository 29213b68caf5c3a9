// Records as a server writes them: groups, batches of them, releases, aborts, switches.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "rollout/journal/live_set.h"
#include "rollout/journal/record.h"

namespace rollpack::rollout::testing {

inline AcceptedGroup made_group(int64_t request, int32_t prompt, int32_t size) {
  AcceptedGroup group;
  group.request.key = {.request_id = request,
                       .prompt_index = prompt,
                       .prompt_id = {.text = fmt::format("p{}", request * 100 + prompt)},
                       .group_size = size};
  group.request.prompt_ids = std::make_shared<const std::vector<int32_t>>(
      std::vector<int32_t>{static_cast<int32_t>(request), prompt, 7});
  group.request.sampling = {.params = {.temperature = 0.7f, .top_k = 5},
                            .seed = 99 + static_cast<uint64_t>(request),
                            .response_length = 12,
                            .stop_token_ids = {2, 3}};
  group.origin = fmt::format("submit prompts[{}]", prompt);
  return group;
}

inline record::Accepted made_request(int64_t request, int32_t num_prompts, int32_t size) {
  record::Accepted accepted{.request_id = request};
  for (int32_t p = 0; p < num_prompts; ++p) {
    accepted.groups.push_back({.accepted = made_group(request, p, size)});
  }
  return accepted;
}

// A batch of one whole group.
inline bridge::FormedBatch made_batch(uint64_t batch_seq, int64_t request, int32_t prompt,
                                      int32_t size) {
  bridge::FormedBatch batch{.batch_seq = batch_seq, .num_groups = 1, .num_complete_groups = 1};
  for (int32_t i = 0; i < size; ++i) {
    batch.samples.push_back({.request_id = request, .prompt_index = prompt, .sample_index = i});
  }
  return batch;
}

// `count` records, none of which contradicts those before it.
inline std::vector<Record> made_records(int count) {
  std::vector<Record> records;
  uint64_t batch_seq = 0;
  for (int64_t request = 0; static_cast<int>(records.size()) < count; ++request) {
    records.push_back(made_request(request, 3, 2));
    records.push_back(record::Formed{{made_batch(++batch_seq, request, 1, 2)}});
    bridge::FormedBatch partial = made_batch(++batch_seq, request, 0, 1);
    partial.samples[0].num_tokens = 4;
    partial.failed.push_back({.key = made_group(request, 0, 2).request.key,
                              .error = {.code = ErrorCode::kNonFinite, .value = "NaN"}});
    partial.failed[0].key.sample_index = 1;
    records.push_back(record::Formed{{partial}});
    if (request % 2 == 0) records.push_back(record::Released{batch_seq - 1});
    if (request % 3 == 1) records.push_back(record::Aborted{request});
    if (request % 3 == 2) records.push_back(record::Switched{request});
    if (request % 4 == 3) records.push_back(record::Released{batch_seq});
  }
  records.resize(static_cast<size_t>(count));
  return records;
}

inline std::string encoded(const LiveSet& live) {
  std::string text;
  for (const Record& record : live.records()) text += encode(record) + "|";
  return text;
}

}  // namespace rollpack::rollout::testing
