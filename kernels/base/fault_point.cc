#include "kernels/base/fault_point.h"

#include <signal.h>
#include <unistd.h>

#include <array>
#include <charconv>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/error.h"

namespace rollpack {
namespace {

constexpr auto kNumPoints = static_cast<size_t>(FaultPoint::kCount);
constexpr std::array<std::string_view, kNumPoints> kPoints = {
    "worker_connected", "worker_loaded",    "groups_taken",   "step_begun",    "layer_run",
    "step_computed",    "sample_cut_off",   "sample_sent",    "weights_begun", "weights_staged",
    "weights_checked",  "weights_switched", "worker_given_up"};

enum class Action : uint8_t { kKill, kSegv, kAbort, kExit, kStop, kSkip, kCount };
constexpr std::array<std::string_view, static_cast<size_t>(Action::kCount)> kActions = {
    "kill", "segv", "abort", "exit", "stop", "skip"};

struct Fault {
  int64_t count = 0;
  Action action = Action::kKill;
  std::atomic<int64_t> num_visits = 0;
};
std::array<Fault, kNumPoints> faults;

template <size_t kSize>
std::string list(const std::array<std::string_view, kSize>& names) {
  std::string text;
  for (const std::string_view name : names) text += (text.empty() ? "" : ", ") + std::string(name);
  return text;
}

template <size_t kSize>
size_t index_of(std::string_view name, const std::array<std::string_view, kSize>& names) {
  size_t index = 0;
  while (index < kSize && names[index] != name) ++index;
  return index;
}

[[noreturn]] void refuse(std::string_view entry, const std::string& allowed) {
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = "ROLLPACK_FAULT",
               .value = std::string(entry),
               .allowed = allowed,
               .message = "it is for tests; unset it"});
}

int64_t number_in(std::string_view entry, std::string_view text) {
  int64_t number = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size() || number < 0) {
    refuse(entry, "point:count:action[@rank], count and rank as numbers from 0 on");
  }
  return number;
}

// What stands before the next `separator`; takes both off `text`.
std::string_view take(std::string_view& text, char separator) {
  const size_t end = text.find(separator);
  const std::string_view part = text.substr(0, end);
  text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
  return part;
}

void arm(std::string_view entry, int rank) {
  std::string_view rest = entry;
  const std::string_view name = take(rest, ':'), count = take(rest, ':'), what = take(rest, '@');
  const size_t point = index_of(name, kPoints);
  if (point == kPoints.size()) refuse(entry, "a point of " + list(kPoints));
  const size_t action = index_of(what, kActions);
  if (action == kActions.size()) refuse(entry, "an action of " + list(kActions));
  const int64_t visit = number_in(entry, count);
  const bool is_mine = rest.empty() ? rank != 0 : number_in(entry, rest) == rank;
  if (!is_mine) return;
  faults[point].count = visit;
  faults[point].action = static_cast<Action>(action);
  fault_detail::armed.fetch_or(1u << point);
}

}  // namespace

std::atomic<uint32_t> fault_detail::armed = 0;

void arm_faults(int rank) {
  const char* text = std::getenv("ROLLPACK_FAULT");
  if (text == nullptr) return;
  std::string_view rest = text;
  while (!rest.empty()) arm(take(rest, ','), rank);
}

bool fault_detail::visit(FaultPoint point) {
  Fault& fault = faults[static_cast<size_t>(point)];
  const int64_t visit = fault.num_visits.fetch_add(1) + 1;
  if (fault.count != 0 && visit != fault.count) return false;
  switch (fault.action) {
    case Action::kKill:
      ::kill(::getpid(), SIGKILL);
      break;
    case Action::kSegv:
      ::signal(SIGSEGV, SIG_DFL);
      ::raise(SIGSEGV);
      break;
    case Action::kAbort:
      std::abort();
    case Action::kExit:
      std::_Exit(0);
    case Action::kStop:
      ::kill(::getpid(), SIGSTOP);
      break;
    case Action::kSkip:
      return true;
    case Action::kCount:
      break;
  }
  return false;
}

}  // namespace rollpack
