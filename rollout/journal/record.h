// What a journal is made of: one record for each thing that must outlive the process, in the order
// in which they happened.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "rollout/journal/request_log.h"
#include "trainer_bridge/contract/delivery_log.h"

namespace rollpack::rollout::record {

// The first record, and only that.
struct Header {
  std::string instance;  // of the journal
  std::string maker;     // equal makers give equal bits
};

// Numbers that must not be given out twice though nothing lives that carries them.
struct Counters {
  int64_t num_requests = 0;
  uint64_t last_batch_seq = 0;
  uint64_t num_steps = 0;
  int64_t weight_version = 0;
};

struct Group {
  AcceptedGroup accepted;
  // Of a rewritten journal; both start out empty.
  bool is_aborted = false;
  std::vector<int32_t> released;  // sample indices
};

struct Accepted {
  int64_t request_id = 0;
  std::vector<Group> groups;
};

struct Aborted {
  std::optional<int64_t> request_id;
};

struct Formed {
  std::vector<bridge::FormedBatch> batches;
};

struct Released {
  uint64_t batch_seq = 0;
};

struct Switched {
  int64_t weight_version = 0;
};

// Of the bridge of another node than rank 0's, by which its groups were accepted. Its batches and
// steps are numbered by itself: where they are written down, the node is in the upper bits of
// batch_seq and step.
struct NodeAccepted {
  int32_t node = 0;
  Accepted accepted;
};

struct NodeCounters {
  int32_t node = 0;
  uint64_t last_batch_seq = 0;
  uint64_t num_steps = 0;
};

inline constexpr int kNodeShift = 48;
inline constexpr int32_t kMaxNode = 65535;

constexpr uint64_t at_node(int32_t node, uint64_t number) {
  return (static_cast<uint64_t>(node) << kNodeShift) | number;
}
constexpr int32_t node_of(uint64_t number) {
  return static_cast<int32_t>(number >> kNodeShift);
}
constexpr uint64_t without_node(uint64_t number) {
  return number & ((uint64_t{1} << kNodeShift) - 1);
}

}  // namespace rollpack::rollout::record

namespace rollpack::rollout {

// The order is the file's format: append only.
using Record = std::variant<record::Header, record::Counters, record::Accepted, record::Aborted,
                            record::Formed, record::Released, record::Switched,
                            record::NodeAccepted, record::NodeCounters>;

// Little-endian, lists and texts after their length; version 1 of the format.
std::string encode(const Record& record);
// Errors: data_loss for bytes that are no record, whatever they are.
Record decode_record(std::string_view bytes);

}  // namespace rollpack::rollout
