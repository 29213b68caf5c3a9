// Ten thousand batches through four slots, every byte checked on the client's side of the memory;
// a thousand under sanitizers.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <set>
#include <utility>
#include <vector>

#include "tests/sanitized.h"
#include "tests/trainer_bridge/layout/batch_reader.h"
#include "tests/trainer_bridge/server/server_fixture.h"
#include "tests/trainer_bridge/wire/sockets.h"

namespace rollpack::bridge {
namespace {

constexpr int kNumBatches = kIsSanitized ? 1000 : 10000;
constexpr int kPromptsPerSubmit = 500;

TEST_F(ServerTest, HandOversKeepEveryByteAndEveryDescriptor) {
  start({.slots = 4, .slot_bytes = 1 << 14});
  TestClient client = connect();
  std::set<std::pair<int64_t, int32_t>> seen;  // request, prompt
  uint64_t last_seq = 0;
  size_t open_before = 0;
  for (int i = 0; i < kNumBatches; ++i) {
    if (i % kPromptsPerSubmit == 0) {
      std::vector<std::vector<int32_t>> prompts;
      for (int p = 0; p < kPromptsPerSubmit; ++p) prompts.push_back({p % kFakeVocab % 63, i % 61});
      client.submit(prompts, 1);
    }
    if (i == 10) open_before = num_open_fds();
    const Json notice = client.next_batch(1);
    ASSERT_EQ(notice.at("batch_seq"), ++last_seq);
    const auto batch = testing::read_batch(client.bytes_of(notice));  // compares the checksum
    ASSERT_EQ(batch.batch_seq, last_seq);
    const auto ids = batch.values<int32_t>("input_ids");
    const std::vector<int32_t> prompt(ids.begin(), ids.begin() + 2);
    const auto expected = fake_response(prompt, 0, 8);
    ASSERT_TRUE(std::equal(expected.begin(), expected.end(), ids.begin() + 2, ids.end()));
    ASSERT_TRUE(seen.insert({batch.values<int64_t>("request_id")[0],
                             batch.values<int32_t>("prompt_index")[0]})
                    .second)
        << "a group came twice";
    ASSERT_TRUE(client.release(notice).at("ok"));
  }
  EXPECT_EQ(seen.size(), static_cast<size_t>(kNumBatches));
  EXPECT_EQ(num_open_fds(), open_before);
  EXPECT_EQ(stat(client, "num_samples_held"), 0);
  EXPECT_EQ(stat(client, "num_slots_in_use"), 0);
}

}  // namespace
}  // namespace rollpack::bridge
