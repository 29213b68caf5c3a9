// What an engine can serve at all, said before a request is accepted.
#include <algorithm>

#include <fmt/format.h>

#include "rollout/engine/engine.h"

namespace rollpack::rollout {
namespace {

bridge::Outcome check_fits(int64_t num_positions, const EngineLimits& limits,
                           const std::string& origin) {
  const int64_t num_pages = pages_for(num_positions, limits.page_tokens);
  if (num_pages <= limits.num_pages) return std::nullopt;
  return ErrorInfo{.code = ErrorCode::kResourceExhausted,
                   .field = "engine.kv_cache_memory",
                   .value = fmt::format("{} bytes", limits.num_pages * limits.page_bytes),
                   .origin = origin,
                   .allowed = fmt::format("at least {} bytes for this sequence of up to {} tokens",
                                          num_pages * limits.page_bytes, num_positions),
                   .message = "raise engine.kv_cache_memory or shorten prompt or response"};
}

}  // namespace

bridge::Outcome check_group(const GroupRequest& request, const EngineLimits& limits,
                            const std::string& origin) {
  const auto num_prompt = static_cast<int64_t>(request.prompt_ids->size());
  if (num_prompt > limits.max_positions) {
    return ErrorInfo{.code = ErrorCode::kInvalidArgument,
                     .field = "input_ids",
                     .value = fmt::format("{} tokens", num_prompt),
                     .origin = origin,
                     .allowed = fmt::format("at most max_position_embeddings = {} tokens",
                                            limits.max_positions)};
  }
  if (!limits.chunked_prefill && num_prompt > limits.max_num_batched_tokens) {
    return ErrorInfo{.code = ErrorCode::kInvalidArgument,
                     .field = "input_ids",
                     .value = fmt::format("{} tokens", num_prompt),
                     .origin = origin,
                     .allowed = fmt::format("at most engine.max_num_batched_tokens = {} tokens "
                                            "while engine.enable_chunked_prefill is false",
                                            limits.max_num_batched_tokens)};
  }
  int32_t longest = request.response_limit(0);
  for (const int32_t length : request.response_lengths) longest = std::max(longest, length);
  return check_fits(std::min(num_prompt + longest, limits.max_positions), limits, origin);
}

bridge::Outcome check_score(const bridge::ScoreSequence& sequence, const EngineLimits& limits,
                            int64_t vocab_size) {
  const auto invalid = [&](const char* field, std::string value, std::string allowed) {
    return ErrorInfo{.code = ErrorCode::kInvalidArgument,
                     .field = field,
                     .value = std::move(value),
                     .origin = sequence.origin,
                     .allowed = std::move(allowed)};
  };
  if (sequence.input_ids.empty()) return invalid("input_ids", "[]", "at least one token");
  for (const auto* ids : {&sequence.input_ids, &sequence.response_ids}) {
    for (const int32_t id : *ids) {
      if (id >= 0 && id < vocab_size) continue;
      return invalid(ids == &sequence.input_ids ? "input_ids" : "response_ids",
                     fmt::format("{}", id), fmt::format("token ids from 0 to {}", vocab_size - 1));
    }
  }
  const auto length =
      static_cast<int64_t>(sequence.input_ids.size() + sequence.response_ids.size());
  if (length > limits.max_positions) {
    return invalid(
        "input_ids + response_ids", fmt::format("{} tokens", length),
        fmt::format("at most max_position_embeddings = {} tokens", limits.max_positions));
  }
  return check_fits(length, limits, sequence.origin);
}

}  // namespace rollpack::rollout
