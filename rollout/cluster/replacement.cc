#include "rollout/cluster/replacement.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string_view>
#include <vector>

#include <fmt/format.h>

#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

constexpr char kVariable[] = "ROLLPACK_JOIN";
// Where the child finds its socket: the first number after the standard streams.
constexpr int kChildSocket = 3;

[[noreturn]] void fail_call(const char* call, int error) {
  throw Error({.code = ErrorCode::kUnavailable,
               .field = "replacement",
               .value = "not started",
               .message = fmt::format("{}: {}", call, std::strerror(error))});
}

std::vector<std::string> own_arguments() {
  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  std::vector<std::string> arguments;
  for (size_t begin = 0; begin < text.size();) {
    arguments.emplace_back(text.c_str() + begin);
    begin += arguments.back().size() + 1;
  }
  return arguments;
}

// Ours without what would make the child a rank of mpirun's, or speak for rank 0.
std::vector<std::string> child_environment(const std::string& order) {
  std::vector<std::string> environment = {fmt::format("{}={}", kVariable, order)};
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text(*entry);
    bool is_left_out = false;
    for (const char* prefix :
         {"OMPI_", "PMIX_", "PMI_", "ORTE_", "ROLLPACK_JOIN=", "ROLLPACK_STATUS_FILE="}) {
      is_left_out |= text.starts_with(prefix);
    }
    if (!is_left_out) environment.emplace_back(text);
  }
  return environment;
}

std::vector<char*> pointers_to(std::vector<std::string>& texts) {
  std::vector<char*> pointers;
  for (std::string& text : texts) pointers.push_back(text.data());
  pointers.push_back(nullptr);
  return pointers;
}

}  // namespace

// "PARENT RANK PLACE RANKS LINE"
std::optional<JoinOrder> join_order() {
  const char* text = std::getenv(kVariable);
  if (text == nullptr) return std::nullopt;
  JoinOrder order{.socket = kChildSocket};
  const char* const end = text + std::strlen(text);
  for (int* number : {&order.parent, &order.rank, &order.rank_on_node, &order.num_ranks}) {
    const auto parsed = std::from_chars(text, end, *number);
    if (parsed.ec != std::errc() || parsed.ptr == end || *parsed.ptr != ' ') {
      throw Error({.code = ErrorCode::kInvalidArgument,
                   .field = kVariable,
                   .value = std::getenv(kVariable),
                   .allowed = "not set: rank 0 sets it for the workers it starts"});
    }
    text = parsed.ptr + 1;
  }
  order.line = text;
  ::fcntl(order.socket, F_SETFD, FD_CLOEXEC);
  return order;
}

Child start_child(int rank, int rank_on_node, int num_ranks, const std::string& line) {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
    fail_call("socketpair", errno);
  }
  Child child;
  child.socket.reset(ends[0]);
  const bridge::OwnedFd theirs(ends[1]);
  std::vector<std::string> arguments = own_arguments();
  std::vector<std::string> environment = child_environment(
      fmt::format("{} {} {} {} {}", ::getpid(), rank, rank_on_node, num_ranks, line));
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, theirs.get(), kChildSocket);
  // Not fork(): this process has threads, and memory that a copy would have to account for.
  const int error = ::posix_spawn(&child.pid, "/proc/self/exe", &actions, nullptr,
                                  pointers_to(arguments).data(), pointers_to(environment).data());
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) fail_call("posix_spawn", error);
  // Nobody has waited for it yet, so the number is still its own.
  child.process.reset(static_cast<int>(::syscall(SYS_pidfd_open, child.pid, 0)));
  if (!child.process) fail_call("pidfd_open", errno);
  return child;
}

}  // namespace rollpack::rollout
