// Writes one batch of example samples to a file, and the samples as JSON beside it, so that a
// reader in another language can be held against what went in.
//   write_example_batch LAYOUT NUM_SAMPLES SEED BATCH_FILE JSON_FILE
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

#include "tests/trainer_bridge/layout/example_samples.h"
#include "trainer_bridge/layout/batch_layout.h"

namespace rollpack::bridge {
namespace {

constexpr uint64_t kBatchSeq = 12;
constexpr uint64_t kGeneration = 3;

nlohmann::json to_json(const Sample& sample) {
  nlohmann::json spans = nlohmann::json::array();
  for (const VersionSpan& span : sample.weight_versions) {
    spans.push_back({span.first_token, span.version});
  }
  return {{"request_id", sample.key.request_id},
          {"prompt_index", sample.key.prompt_index},
          {"prompt_id", sample.key.prompt_id.text},
          {"sample_index", sample.key.sample_index},
          {"group_size", sample.key.group_size},
          {"prompt_ids", *sample.prompt_ids},
          {"response_ids", sample.response_ids},
          {"logprobs", sample.logprobs},
          {"scaled_logprobs", sample.scaled_logprobs},
          {"support_logmass", sample.support_logmass},
          {"entropy", sample.entropy},
          {"finish_reason", static_cast<int>(sample.finish_reason)},
          {"stop_token_id", sample.stop_token_id},
          {"temperature", sample.temperature},
          {"weight_versions", spans}};
}

void write_file(const char* path, const char* data, size_t bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(data, static_cast<std::streamsize>(bytes));
  file.close();
  if (!file) throw std::runtime_error(std::string("cannot write ") + path);
}

void write_example(const LayoutOptions& options, int32_t num_samples, uint32_t seed,
                   const char* batch_file, const char* json_file) {
  const std::vector<Sample> samples = testing::example_samples(num_samples, seed, true);
  const std::vector<const Sample*> pointers = testing::pointers_to(samples);
  const std::unique_ptr<BatchLayout> layout = make_layout(options);
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::vector<Line> memory(static_cast<size_t>(layout->batch_bytes(pointers) + 63) / 64);
  const std::span<std::byte> slot = std::as_writable_bytes(std::span(memory));
  uint32_t crc32 = 0;
  const int64_t bytes = layout->write(pointers, kBatchSeq, kGeneration, slot, crc32);
  write_file(batch_file, reinterpret_cast<const char*>(slot.data()), static_cast<size_t>(bytes));

  nlohmann::json described = {{"layout", options.layout},
                              {"max_tokens_per_row", options.max_tokens_per_row},
                              {"pad_token_id", options.pad_token_id},
                              {"batch_seq", kBatchSeq},
                              {"generation", kGeneration},
                              {"crc32", crc32},
                              {"samples", nlohmann::json::array()}};
  for (const Sample& sample : samples) described["samples"].push_back(to_json(sample));
  const std::string text = described.dump(1) + "\n";
  write_file(json_file, text.data(), text.size());
}

}  // namespace
}  // namespace rollpack::bridge

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fputs("usage: write_example_batch LAYOUT NUM_SAMPLES SEED BATCH_FILE JSON_FILE\n", stderr);
    return 2;
  }
  try {
    const rollpack::bridge::LayoutOptions options = {
        .layout = argv[1],
        .max_tokens_per_row = 40,
        .columns = {"logprobs", "scaled_logprobs", "support_logmass", "entropy"},
        .pad_token_id = rollpack::bridge::testing::kPadId};
    rollpack::bridge::write_example(options, std::stoi(argv[2]),
                                    static_cast<uint32_t>(std::stoul(argv[3])), argv[4], argv[5]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "write_example_batch: %s\n", error.what());
    return 1;
  }
  return 0;
}
