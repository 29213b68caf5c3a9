// A journal that is cut, changed, filled up and read again: the longest valid run of records, and
// never one that was not written.
#include "rollout/journal/journal_log.h"

#include <gtest/gtest.h>

#include <random>

#include "rollout/journal/frames.h"
#include "tests/error_text.h"
#include "tests/rollout/journal/made_records.h"
#include "tests/rollout/journal/memory_storage.h"
#include "tests/sanitized.h"

namespace rollpack::rollout {
namespace {

using rollpack::testing::error_of;
using testing::Disk;
using testing::encoded;
using testing::made_batch;
using testing::made_records;
using testing::made_request;
using testing::MemoryStorage;

constexpr int kNumRecords = 50;

JournalLog open(const std::shared_ptr<Disk>& disk, const std::string& maker = "cpu") {
  return {std::make_unique<MemoryStorage>(disk), maker, "abcd"};
}

// A journal of 50 records behind its header, and what lives after each of them.
struct Written {
  std::string bytes;
  std::vector<size_t> ends;         // of each record, the header's first
  std::vector<std::string> states;  // after each
};

const Written& written() {
  static const Written result = [] {
    Written w;
    LiveSet live;
    uint64_t number = 0;
    append_frame(w.bytes, encode(record::Header{"abcd", "cpu"}), number++);
    w.ends.push_back(w.bytes.size());
    w.states.push_back(encoded(live));
    for (const Record& record : made_records(kNumRecords)) {
      append_frame(w.bytes, encode(record), number++);
      live.apply(record);
      w.ends.push_back(w.bytes.size());
      w.states.push_back(encoded(live));
    }
    return w;
  }();
  return result;
}

TEST(JournalLog, CutAtEveryByteItIsTheLongestRunOfWholeRecords) {
  const Written& w = written();
  // Each cut is read from the beginning. The first 20 records have all kinds among them.
  const size_t end = kIsSanitized ? w.ends[20] : w.bytes.size();
  for (size_t size = 0; size <= end; ++size) {
    const auto num_whole =
        static_cast<size_t>(std::upper_bound(w.ends.begin(), w.ends.end(), size) - w.ends.begin());
    const Frames frames = read_frames(std::string_view(w.bytes).substr(0, size));
    ASSERT_EQ(frames.records.size(), num_whole) << "cut at " << size;
    const auto disk = std::make_shared<Disk>();
    disk->synced = w.bytes.substr(0, size);
    if (size == 0) continue;  // a new one
    if (num_whole == 0) {
      EXPECT_EQ(error_of([&] { open(disk); }).code, ErrorCode::kDataLoss);
      EXPECT_EQ(disk->synced.size(), size) << "what is no journal is left alone";
      continue;
    }
    const JournalLog log = open(disk);
    const size_t cut = size - w.ends[num_whole - 1];
    ASSERT_EQ(log.num_cut_bytes(), static_cast<int64_t>(cut));
    LiveSet expected;
    for (size_t i = 1; i < num_whole; ++i) {
      expected.apply(decode_record(frames.records[i]));
    }
    if (cut > 0) expected.skip_numbers(int64_t{1} << 32);
    ASSERT_EQ(encoded(log.live()), encoded(expected)) << "cut at " << size;
    if (cut == 0) {
      ASSERT_EQ(encoded(log.live()), w.states[num_whole - 1]);
    }
  }
}

TEST(JournalLog, AFlippedBitEndsItBeforeTheRecordAndMakesNoOther) {
  const Written& w = written();
  std::mt19937 random(5);
  for (int i = 0; i < 1000; ++i) {
    const size_t bit = random() % (w.bytes.size() * 8);
    std::string bytes = w.bytes;
    bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ (1 << (bit % 8)));
    const auto num_whole = static_cast<size_t>(
        std::upper_bound(w.ends.begin(), w.ends.end(), bit / 8) - w.ends.begin());
    const Frames frames = read_frames(bytes);
    ASSERT_EQ(frames.records.size(), num_whole) << "bit " << bit;
    for (size_t r = 0; r < num_whole; ++r) {
      const size_t start = r == 0 ? 0 : w.ends[r - 1];
      ASSERT_EQ(frames.records[r],
                std::string_view(w.bytes).substr(start + kFrameHeadBytes,
                                                 w.ends[r] - start - kFrameHeadBytes));
    }
  }
}

TEST(JournalLog, ARecordSaysTheSameAfterItWasReadAndNoCutOfItIsARecord) {
  for (const Record& record : made_records(12)) {
    const std::string bytes = encode(record);
    EXPECT_EQ(encode(decode_record(bytes)), bytes);
    for (size_t size = 0; size < bytes.size(); ++size) {
      EXPECT_EQ(error_of([&] { decode_record(bytes.substr(0, size)); }).code, ErrorCode::kDataLoss);
    }
    EXPECT_EQ(error_of([&] { decode_record(bytes + "x"); }).code, ErrorCode::kDataLoss);
  }
}

TEST(JournalLog, RandomBytesInsideARecordAreRefusedOrMakeARecord) {
  std::mt19937 random(6);
  for (const Record& record : made_records(8)) {
    const std::string good = encode(record);
    for (int i = 0; i < (kIsSanitized ? 200 : 2000); ++i) {
      std::string bytes = good;
      for (int k = 0; k < 3; ++k) bytes[random() % bytes.size()] = static_cast<char>(random());
      LiveSet live;
      try {
        live.apply(made_request(0, 3, 2));
        live.apply(decode_record(bytes));
      } catch (const Error& error) {
        EXPECT_EQ(error.info.code, ErrorCode::kDataLoss);
      }
    }
  }
}

TEST(JournalLog, WhatWasCommittedIsThereAgainAndNumbersGoOn) {
  const auto disk = std::make_shared<Disk>();
  std::string before;
  {
    JournalLog log = open(disk);
    for (const Record& record : made_records(kNumRecords)) log.append(record);
    log.commit();
    EXPECT_EQ(disk->num_syncs, 1) << "one for all";
    before = encoded(log.live());
  }
  const JournalLog log = open(disk);
  EXPECT_EQ(encoded(log.live()), before);
  EXPECT_EQ(log.num_cut_bytes(), 0);
  EXPECT_EQ(log.instance(), "abcd");
  EXPECT_GT(log.live().counters().num_requests, 5);
}

TEST(JournalLog, NumbersOfALostTailAreNotGivenOutAgain) {
  const auto disk = std::make_shared<Disk>();
  {
    JournalLog log = open(disk);
    log.append(made_request(0, 2, 2));
    log.commit();
    log.append(record::Formed{{made_batch(1, 0, 0, 2)}});
    log.commit();
  }
  disk->synced.pop_back();
  const JournalLog log = open(disk);
  EXPECT_EQ(log.live().num_batches(), 0);
  EXPECT_GT(log.live().counters().last_batch_seq, 1u);
  EXPECT_EQ(log.live().counters().num_requests, 1);
}

TEST(JournalLog, ItStaysAboutAsLargeAsWhatLives) {
  const auto disk = std::make_shared<Disk>();
  JournalLog log = open(disk);
  uint64_t batch_seq = 0;
  for (int64_t request = 0; request < 40000; ++request) {
    log.append(made_request(request, 1, 2));
    log.append(record::Formed{{made_batch(++batch_seq, request, 0, 2)}});
    if (request >= 10) log.append(record::Released{batch_seq - 10});
    if (request % 100 == 0) log.commit();
    ASSERT_LT(static_cast<int64_t>(disk->synced.size()), 2 * JournalLog::kMinRewriteBytes);
  }
  EXPECT_GT(log.num_rewrites(), 5);
  EXPECT_LT(log.num_rewrites(), 20);
  EXPECT_EQ(log.live().num_groups(), 10);
  log.commit();
  EXPECT_EQ(encoded(open(disk).live()), encoded(log.live()));
}

TEST(JournalLog, AnotherMakersJournalIsRefusedWhileSomethingLivesInIt) {
  const auto disk = std::make_shared<Disk>();
  {
    JournalLog log = open(disk, "cpu, a");
    log.append(made_request(0, 1, 1));
    log.commit();
  }
  const ErrorInfo error = error_of([&] { open(disk, "cpu, b"); });
  EXPECT_EQ(error.code, ErrorCode::kFailedPrecondition);
  EXPECT_EQ(error.allowed, "cpu, b");
  EXPECT_NE(error.value.find("cpu, a"), std::string::npos);
  {
    JournalLog log = open(disk, "cpu, a");
    log.append(record::Formed{{made_batch(1, 0, 0, 1)}});
    log.append(record::Released{1});
    log.commit();
  }
  EXPECT_EQ(open(disk, "cpu, b").live().num_groups(), 0);
}

TEST(JournalLog, AFullDiskIsAnErrorAndWhatWasThereBeforeIsReadAgain) {
  const auto disk = std::make_shared<Disk>();
  std::string before;
  {
    JournalLog log = open(disk);
    log.append(made_request(0, 2, 2));
    log.commit();
    before = encoded(log.live());
    disk->max_bytes = disk->synced.size() + 100;
    log.append(made_request(1, 2, 2));
    EXPECT_EQ(error_of([&] { log.commit(); }).code, ErrorCode::kResourceExhausted);
  }
  disk->max_bytes = size_t{1} << 30;
  disk->lose_power(50);
  LiveSet expected;
  expected.apply(made_request(0, 2, 2));
  expected.skip_numbers(int64_t{1} << 32);
  EXPECT_EQ(encoded(open(disk).live()), encoded(expected));
}

}  // namespace
}  // namespace rollpack::rollout
