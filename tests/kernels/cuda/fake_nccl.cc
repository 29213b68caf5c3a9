// A libnccl whose ranks are threads and whose devices are host memory. It does what the program
// asks of NCCL and no more, and as late as NCCL may: a call is in progress until all ranks have
// made theirs, which shows when its communicator is asked for its state.
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

#ifdef FAKE_NCCL_IS_OLD
constexpr int kVersion = 21205;
#else
constexpr int kVersion = 22809;
#endif

enum Result : int { kSuccess = 0, kInvalidArgument = 4, kInProgress = 7 };
enum Type : int { kU8 = 1, kI32 = 2, kU32 = 3, kI64 = 4, kU64 = 5 };

struct UniqueId {
  char internal[128];
};

struct Config {
  size_t size;
  unsigned magic, version;
  int blocking;
};

// What a rank gives in a round. A rank is at most one round ahead of another.
struct Post {
  int64_t round = -1;
  std::vector<std::byte> bytes;
};

struct Group {
  explicit Group(int size) : posts(static_cast<size_t>(size)) {}
  std::vector<std::array<Post, 2>> posts;  // [ranks][round % 2]
};

enum class Kind { kInit, kGather, kReduce, kBroadcast };

struct Call {
  Kind kind = Kind::kInit;
  std::byte* receive = nullptr;
  size_t count = 0;
  int type = kU8, op = 0, root = 0;
};

std::mutex mutex;
std::map<std::string, std::shared_ptr<Group>> groups;
int num_ids = 0;

size_t bytes_of(int type) {
  return type == kU8 ? 1 : type == kI64 || type == kU64 ? 8 : 4;
}

template <class T>
void combine(std::byte* into, const std::byte* from, size_t count, int op) {
  for (size_t i = 0; i < count; ++i) {
    T a, b;
    std::memcpy(&a, into + i * sizeof(T), sizeof(T));
    std::memcpy(&b, from + i * sizeof(T), sizeof(T));
    a = op == 0 ? static_cast<T>(a + b) : (op == 2) == (b > a) ? b : a;
    std::memcpy(into + i * sizeof(T), &a, sizeof(T));
  }
}

}  // namespace

struct NcclComm;

namespace {
std::set<NcclComm*> communicators;
}

struct NcclComm {
  std::shared_ptr<Group> group;
  int rank = 0;
  int64_t round = 0;
  Call call;
  int state = kInProgress;
  int broken = kSuccess;

  size_t place() const { return static_cast<size_t>(round % 2); }

  int start(const Call& made, const void* send, size_t bytes) {
    call = made;
    Post& post = group->posts[static_cast<size_t>(rank)][place()];
    const auto* const from = static_cast<const std::byte*>(send);
    post.bytes.assign(from, from + bytes);
    post.round = round;
    state = kInProgress;
    return kInProgress;
  }

  void go_on() {
    if (state != kInProgress) return;
    for (const auto& posts : group->posts) {
      if (posts[place()].round != round) return;
    }
    for (size_t peer = 0; peer < group->posts.size(); ++peer) {
      take(static_cast<int>(peer), group->posts[peer][place()].bytes);
    }
    ++round;
    state = kSuccess;
  }

  void take(int peer, const std::vector<std::byte>& bytes) const {
    if (call.kind == Kind::kGather) {
      std::memcpy(call.receive + static_cast<size_t>(peer) * call.count, bytes.data(), call.count);
    } else if (call.kind == Kind::kBroadcast) {
      if (peer == call.root) std::memcpy(call.receive, bytes.data(), bytes.size());
    } else if (call.kind == Kind::kReduce) {
      if (peer == 0) {
        std::memcpy(call.receive, bytes.data(), bytes.size());
      } else if (call.type == kU8) {
        combine<uint8_t>(call.receive, bytes.data(), call.count, call.op);
      } else if (bytes_of(call.type) == 4) {
        combine<uint32_t>(call.receive, bytes.data(), call.count, call.op);
      } else {
        combine<uint64_t>(call.receive, bytes.data(), call.count, call.op);
      }
    }
  }
};

extern "C" {

int ncclGetVersion(int* version) {
  *version = kVersion;
  return kSuccess;
}

int ncclGetUniqueId(UniqueId* id) {
  const std::lock_guard lock(mutex);
  std::memset(id, 0, sizeof *id);
  const std::string text = "fake " + std::to_string(++num_ids);
  std::memcpy(id->internal, text.data(), text.size());
  return kSuccess;
}

const char* ncclGetErrorString(int result) {
  return result == 6 ? "remote process exited or there was a network error" : "some error";
}

const char* ncclGetLastError(NcclComm*) {
  return "";
}

int ncclCommInitRankConfig(NcclComm** comm, int size, UniqueId id, int rank, Config* config) {
  if (config->magic != 0xcafebeef || config->blocking != 0 || rank < 0 || rank >= size) {
    return kInvalidArgument;
  }
  const std::lock_guard lock(mutex);
  auto& group = groups[std::string(id.internal, sizeof id.internal)];
  if (!group) group = std::make_shared<Group>(size);
  *comm = new NcclComm{.group = group, .rank = rank, .call = {}};
  communicators.insert(*comm);
  return (*comm)->start({.kind = Kind::kInit}, nullptr, 0);
}

int ncclCommGetAsyncError(NcclComm* comm, int* state) {
  const std::lock_guard lock(mutex);
  if (comm->broken == kSuccess) comm->go_on();
  *state = comm->broken != kSuccess ? comm->broken : comm->state;
  return kSuccess;
}

#ifndef FAKE_NCCL_IS_PARTIAL
int ncclCommAbort(NcclComm* comm) {
  const std::lock_guard lock(mutex);
  communicators.erase(comm);
  delete comm;
  return kSuccess;
}
#endif

int ncclAllGather(const void* send, void* receive, size_t count, int type, NcclComm* comm, void*) {
  const std::lock_guard lock(mutex);
  const size_t bytes = count * bytes_of(type);
  return comm->start(
      {.kind = Kind::kGather, .receive = static_cast<std::byte*>(receive), .count = bytes}, send,
      bytes);
}

int ncclAllReduce(const void* send, void* receive, size_t count, int type, int op, NcclComm* comm,
                  void*) {
  const std::lock_guard lock(mutex);
  return comm->start({.kind = Kind::kReduce,
                      .receive = static_cast<std::byte*>(receive),
                      .count = count,
                      .type = type,
                      .op = op},
                     send, count * bytes_of(type));
}

int ncclBroadcast(const void* send, void* receive, size_t count, int type, int root, NcclComm* comm,
                  void*) {
  const std::lock_guard lock(mutex);
  return comm->start(
      {.kind = Kind::kBroadcast, .receive = static_cast<std::byte*>(receive), .root = root}, send,
      count * bytes_of(type));
}

// ---- for tests: not of NCCL

// What NCCL finds out by itself of the communicators of a rank.
void fake_nccl_break(int rank, int result) {
  const std::lock_guard lock(mutex);
  for (NcclComm* comm : communicators) {
    if (comm->rank == rank) comm->broken = result;
  }
}

int fake_nccl_num_communicators() {
  const std::lock_guard lock(mutex);
  return static_cast<int>(communicators.size());
}

}  // extern "C"
