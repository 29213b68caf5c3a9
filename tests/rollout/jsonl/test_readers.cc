#include "rollout/jsonl/readers.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/error_text.h"
#include "tests/rollout/temporary_folder.h"

namespace rollpack::rollout {
namespace {

using testing::error_text;
using testing::TemporaryFolder;
using testing::with_replaced;

struct BadLine {
  std::string line, error;
};

// Each bad line stands behind a good one and a blank one, so in line 3.
void expect_errors(const std::string& good, const std::vector<BadLine>& cases,
                   const std::function<void(const std::string&)>& read) {
  const TemporaryFolder folder;
  for (const BadLine& bad : cases) {
    const std::string path = folder.write("in.jsonl", good + "\n \t\r\n" + bad.line + "\n");
    const std::string got = with_replaced(error_text([&] { read(path); }), folder.path(), "DIR");
    EXPECT_EQ(got, "invalid_argument: " + bad.error);
  }
}

TEST(Prompts, EveryKeyIsRead) {
  const TemporaryFolder folder;
  const auto prompts = read_prompts(folder.write(
      "p.jsonl",
      "{\"prompt_id\": \"gsm8k-0\", \"input_ids\": [1, 2], \"n\": 4, \"sampling\": "
      "{\"temperature\": "
      "0.7, \"top_k\": 5, \"top_p\": 0.9, \"min_p\": 0.1, \"seed\": 18446744073709551615, "
      "\"response_length\": 9, \"min_tokens\": 1, \"stop_token_ids\": [3], \"ignore_eos\": "
      "true}}\r\n"
      "\n"
      "{\"input_ids\": [2147483647]}\n"
      "{\"prompt_id\": -7, \"input_ids\": [0], \"sampling\": {\"top_k\": null}}"));
  ASSERT_EQ(prompts.size(), 3u);
  EXPECT_EQ(prompts[0].prompt_id->text, "gsm8k-0");
  EXPECT_FALSE(prompts[0].prompt_id->is_integer);
  EXPECT_EQ(prompts[0].input_ids, (std::vector<int32_t>{1, 2}));
  EXPECT_EQ(prompts[0].n, 4);
  EXPECT_EQ(prompts[0].origin, folder.file("p.jsonl") + ":1");
  const bridge::SamplingOverrides& sampling = prompts[0].sampling;
  EXPECT_EQ(sampling.temperature, 0.7f);
  EXPECT_EQ(sampling.top_k, 5);
  EXPECT_EQ(sampling.top_p, 0.9f);
  EXPECT_EQ(sampling.min_p, 0.1f);
  EXPECT_EQ(sampling.seed, 18446744073709551615u);
  EXPECT_EQ(sampling.response_length, 9);
  EXPECT_EQ(sampling.min_tokens, 1);
  EXPECT_EQ(sampling.stop_token_ids, (std::vector<int32_t>{3}));
  EXPECT_EQ(sampling.ignore_eos, true);

  // Absent: the line's number from 0, the blank line counted.
  EXPECT_EQ(prompts[1].prompt_id->text, "2");
  EXPECT_TRUE(prompts[1].prompt_id->is_integer);
  EXPECT_EQ(prompts[1].n, std::nullopt);
  EXPECT_EQ(prompts[1].sampling.temperature, std::nullopt);
  EXPECT_EQ(prompts[2].prompt_id->text, "-7");
  EXPECT_EQ(prompts[2].sampling.top_k, -1);
}

TEST(Prompts, AnEmptyFileHoldsNone) {
  const TemporaryFolder folder;
  EXPECT_TRUE(read_prompts(folder.write("p.jsonl", "\n\n")).empty());
}

TEST(Prompts, BadLinesNameLineKeyValueAndWhatIsAllowed) {
  const std::vector<BadLine> cases = {
      {"[1]", "line = [1] (DIR/in.jsonl:3): expected a JSON object"},
      {"{\"input_ids\": [1]",
       "DIR/in.jsonl:3: expected valid JSON; syntax error while parsing object - unexpected end of "
       "input; expected '}'"},
      {"{}", "input_ids (DIR/in.jsonl:3): this key is missing"},
      {"{\"input_ids\": []}", "input_ids = [] (DIR/in.jsonl:3): expected at least one token id"},
      {"{\"input_ids\": \"Hello\"}",
       "input_ids = \"Hello\" (DIR/in.jsonl:3): expected a list of integers"},
      {"{\"input_ids\": [1, -2]}",
       "input_ids[1] = -2 (DIR/in.jsonl:3): expected an integer from 0 to 2147483647"},
      {"{\"input_ids\": [1, 2, 2147483648]}",
       "input_ids[2] = 2147483648 (DIR/in.jsonl:3): expected an integer from 0 to 2147483647"},
      {"{\"input_ids\": [1.0]}",
       "input_ids[0] = 1.0 (DIR/in.jsonl:3): expected an integer from 0 to 2147483647"},
      {"{\"input_ids\": [[1]]}",
       "input_ids[0] = [1] (DIR/in.jsonl:3): expected an integer from 0 to 2147483647"},
      {"{\"input_ids\": [1], \"input_ids\": [2]}",
       "input_ids (DIR/in.jsonl:3): expected each key once; this key is repeated in its object"},
      {"{\"input_ids\": [1], \"prompt\": \"hi\"}",
       "prompt = \"hi\" (DIR/in.jsonl:3): expected only the keys prompt_id, input_ids, n, "
       "sampling"},
      {"{\"input_ids\": [1], \"prompt_id\": 1.5}",
       "prompt_id = 1.5 (DIR/in.jsonl:3): expected a string or an integer"},
      {"{\"input_ids\": [1], \"prompt_id\": null}",
       "prompt_id = null (DIR/in.jsonl:3): expected a string or an integer"},
      {"{\"input_ids\": [1], \"prompt_id\": \"" + std::string(4097, 'x') + "\"}",
       "prompt_id = \"" + std::string(59, 'x') +
           "... (DIR/in.jsonl:3): expected at most 4096 bytes; this has 4097"},
      {"{\"input_ids\": [1], \"prompt_id\": \"7\"}",
       "prompt_id = 7 (DIR/in.jsonl:3): expected each prompt_id once (7 and \"7\" are one); it "
       "stands at DIR/in.jsonl:1 already"},
      {"{\"input_ids\": [1], \"n\": 0}",
       "n = 0 (DIR/in.jsonl:3): expected an integer from 1 to 65536"},
      {"{\"input_ids\": [1], \"n\": 1000000000}",
       "n = 1000000000 (DIR/in.jsonl:3): expected an integer from 1 to 65536"},
      {"{\"input_ids\": [1], \"sampling\": 3}",
       "sampling = 3 (DIR/in.jsonl:3): expected a JSON object"},
      {"{\"input_ids\": [1], \"sampling\": {\"temperature\": \"0.7\"}}",
       "sampling.temperature = \"0.7\" (DIR/in.jsonl:3): expected a number"},
      {"{\"input_ids\": [1], \"sampling\": {\"temperature\": null}}",
       "sampling.temperature = null (DIR/in.jsonl:3): expected a number"},
      {"{\"input_ids\": [1], \"sampling\": {\"temperature\": 1e300}}",
       "sampling.temperature = 1e+300 (DIR/in.jsonl:3): expected a number that fits 32-bit floats"},
      {"{\"input_ids\": [1], \"sampling\": {\"top_k\": 2.5}}",
       "sampling.top_k = 2.5 (DIR/in.jsonl:3): expected an integer from -2147483648 to 2147483647"},
      {"{\"input_ids\": [1], \"sampling\": {\"seed\": -1}}",
       "sampling.seed = -1 (DIR/in.jsonl:3): expected an integer from 0 to 2^64 - 1"},
      {"{\"input_ids\": [1], \"sampling\": {\"ignore_eos\": 1}}",
       "sampling.ignore_eos = 1 (DIR/in.jsonl:3): expected true or false"},
      {"{\"input_ids\": [1], \"sampling\": {\"stop_token_ids\": 2}}",
       "sampling.stop_token_ids = 2 (DIR/in.jsonl:3): expected a list of integers"},
      {"{\"input_ids\": [1], \"sampling\": {\"stop\": [\"\\n\"]}}",
       "sampling.stop = [\"\\n\"] (DIR/in.jsonl:3): expected only the keys temperature, top_k, "
       "top_p, "
       "min_p, seed, response_length, min_tokens, stop_token_ids, ignore_eos; stop strings are "
       "refused: text stays with the caller; use stop_token_ids"},
      {"{\"input_ids\": [1], \"sampling\": {\"max_tokens\": 4}}",
       "sampling.max_tokens = 4 (DIR/in.jsonl:3): expected only the keys temperature, top_k, "
       "top_p, "
       "min_p, seed, response_length, min_tokens, stop_token_ids, ignore_eos"},
  };
  expect_errors("{\"prompt_id\": 7, \"input_ids\": [1]}", cases,
                [](const std::string& path) { read_prompts(path); });
}

// An absent id is the line's number, which another line may have taken.
TEST(Prompts, AnAbsentIdMayCollideWithAWrittenOne) {
  const TemporaryFolder folder;
  const std::string path =
      folder.write("p", "{\"prompt_id\": 1, \"input_ids\": [1]}\n{\"input_ids\": [1]}\n");
  EXPECT_EQ(error_text([&] { read_prompts(path); }),
            "invalid_argument: prompt_id = 1 (" + path +
                ":2): expected each prompt_id once (7 and \"7\" are one); it stands at " + path +
                ":1 already");
}

TEST(Sequences, AreReadInOrderAndMayShareIds) {
  const TemporaryFolder folder;
  const auto sequences = read_sequences(folder.write(
      "s.jsonl",
      "{\"id\": \"a\", \"input_ids\": [1], \"response_ids\": [2, 3], \"temperature\": 0.5}\n"
      "{\"id\": \"a\", \"input_ids\": [1], \"response_ids\": []}\n"
      "{\"input_ids\": [1], \"response_ids\": [4], \"temperature\": 1e-5}\n"));
  ASSERT_EQ(sequences.size(), 3u);
  EXPECT_EQ(sequences[0].temperature, 0.5f);
  EXPECT_EQ(sequences[0].response_ids, (std::vector<int32_t>{2, 3}));
  EXPECT_EQ(sequences[1].id.text, "a");
  EXPECT_EQ(sequences[1].temperature, 1.0f);
  EXPECT_EQ(sequences[2].id.text, "2");
  EXPECT_TRUE(sequences[2].id.is_integer);
}

TEST(Sequences, BadLinesNameLineAndKey) {
  const std::vector<BadLine> cases = {
      {"{\"input_ids\": [1]}", "response_ids (DIR/in.jsonl:3): this key is missing"},
      {"{\"response_ids\": [1]}", "input_ids (DIR/in.jsonl:3): this key is missing"},
      {"{\"input_ids\": [1], \"response_ids\": [1], \"prompt_id\": 3}",
       "prompt_id = 3 (DIR/in.jsonl:3): expected only the keys id, input_ids, response_ids, "
       "temperature"},
      {"{\"input_ids\": [1], \"response_ids\": [1], \"temperature\": 1e-6}",
       "temperature = 1e-06 (DIR/in.jsonl:3): expected 0 (greedy) or a number from 1e-5 to 1e5"},
      {"{\"input_ids\": [1], \"response_ids\": [1], \"temperature\": -1}",
       "temperature = -1 (DIR/in.jsonl:3): expected 0 (greedy) or a number from 1e-5 to 1e5"},
  };
  expect_errors("{\"input_ids\": [1], \"response_ids\": [2]}", cases,
                [](const std::string& path) { read_sequences(path); });
}

TEST(Workload, TakesLengthsOrTokens) {
  const TemporaryFolder folder;
  const auto groups = read_workload(folder.write(
      "w.jsonl",
      "{\"prompt_id\": \"tail-0\", \"prompt_tokens\": 236, \"response_tokens\": [57, 33]}\n"
      "{\"input_ids\": [5, 6, 7], \"response_tokens\": [1]}\n"));
  ASSERT_EQ(groups.size(), 2u);
  EXPECT_EQ(groups[0].prompt_id.text, "tail-0");
  EXPECT_EQ(groups[0].prompt_tokens, 236);
  EXPECT_TRUE(groups[0].input_ids.empty());
  EXPECT_EQ(groups[0].response_tokens, (std::vector<int32_t>{57, 33}));
  EXPECT_EQ(groups[1].prompt_tokens, 3);
  EXPECT_EQ(groups[1].input_ids, (std::vector<int32_t>{5, 6, 7}));
  EXPECT_EQ(groups[1].prompt_id.text, "1");
}

TEST(Workload, BadLinesNameLineAndKey) {
  const std::vector<BadLine> cases = {
      {"{\"response_tokens\": [1]}",
       "input_ids (DIR/in.jsonl:3): expected exactly one of input_ids and prompt_tokens"},
      {"{\"prompt_tokens\": 2, \"input_ids\": [1, 2], \"response_tokens\": [1]}",
       "input_ids (DIR/in.jsonl:3): expected exactly one of input_ids and prompt_tokens"},
      {"{\"prompt_tokens\": 0, \"response_tokens\": [1]}",
       "prompt_tokens = 0 (DIR/in.jsonl:3): expected an integer from 1 to 16777216"},
      {"{\"prompt_tokens\": 5}", "response_tokens (DIR/in.jsonl:3): this key is missing"},
      {"{\"prompt_tokens\": 5, \"response_tokens\": []}",
       "response_tokens = [] (DIR/in.jsonl:3): expected at least one length"},
      {"{\"prompt_tokens\": 5, \"response_tokens\": [3, 0]}",
       "response_tokens[1] = 0 (DIR/in.jsonl:3): expected an integer from 1 to 16777216"},
  };
  expect_errors("{\"prompt_tokens\": 5, \"response_tokens\": [1]}", cases,
                [](const std::string& path) { read_workload(path); });
}

}  // namespace
}  // namespace rollpack::rollout
