#include "tests/trainer_bridge/layout/example_samples.h"

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <utility>

namespace rollpack::bridge::testing {
namespace {

// std::mt19937's output is fixed by the standard, its distributions' is not.
using Random = std::mt19937;

int32_t below(Random& random, int32_t bound) {
  return static_cast<int32_t>(random() % static_cast<uint32_t>(bound));
}

// Ids from 0 to 5, so that the pad id comes up everywhere.
std::vector<int32_t> random_ids(Random& random, int32_t num) {
  std::vector<int32_t> ids(num);
  for (int32_t& id : ids) id = below(random, 6);
  return ids;
}

// Sixteenths, so that differences of two are exact.
std::vector<float> random_values(Random& random, size_t num, float sign) {
  std::vector<float> values(num);
  for (float& value : values) value = sign * static_cast<float>(below(random, 160)) / 16.0f;
  return values;
}

void set_response(Random& random, bool has_entropy, int32_t num_tokens, Sample& sample) {
  sample.response_ids = random_ids(random, num_tokens);
  sample.logprobs = random_values(random, num_tokens, -1);
  sample.scaled_logprobs = random_values(random, num_tokens, -1);
  sample.support_logmass = random_values(random, num_tokens, -1);
  if (has_entropy) sample.entropy = random_values(random, num_tokens, 1);
  sample.finish_reason = static_cast<FinishReason>(below(random, 3));
  if (num_tokens > 0 && sample.finish_reason == FinishReason::kStop) {
    sample.response_ids.own().back() = kPadId;
    sample.stop_token_id = kPadId;
  }
  for (int32_t t = 0; t < num_tokens; t += 1 + below(random, num_tokens)) {
    sample.weight_versions.push_back({t, 40 + t});
  }
}

}  // namespace

std::vector<Sample> example_samples(int32_t num, uint32_t seed, bool has_entropy) {
  Random random(seed);
  std::vector<Sample> samples(num);
  std::shared_ptr<const std::vector<int32_t>> prompt;
  for (int32_t s = 0; s < num; ++s) {
    const int32_t group = s / 3;
    if (s % 3 == 0) {
      const int32_t num_prompt = group % 4 == 0 ? 1 : 1 + below(random, 12);
      prompt = std::make_shared<std::vector<int32_t>>(random_ids(random, num_prompt));
    }
    Sample& sample = samples[s];
    sample.key.request_id = (int64_t{1} << 40) + group / 2;
    sample.key.prompt_index = group % 2;
    sample.key.prompt_id.is_integer = group % 2 == 0;
    sample.key.prompt_id.text =
        group % 2 == 0 ? std::to_string(group) : "Größe-" + std::to_string(group);
    sample.key.sample_index = s % 3;
    sample.key.group_size = 3;
    sample.prompt_ids = prompt;
    sample.temperature = 0.25f * static_cast<float>(1 + s % 5);
    set_response(random, has_entropy, s % 5 == 2 ? 0 : 1 + below(random, 9), sample);
  }
  return samples;
}

std::vector<const Sample*> pointers_to(const std::vector<Sample>& samples) {
  std::vector<const Sample*> pointers(samples.size());
  std::transform(samples.begin(), samples.end(), pointers.begin(),
                 [](const Sample& sample) { return &sample; });
  return pointers;
}

}  // namespace rollpack::bridge::testing
