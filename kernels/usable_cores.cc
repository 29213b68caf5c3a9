#include "kernels/usable_cores.h"

#include <fmt/format.h>
#include <sched.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <string_view>

namespace rollpack::kernels {
namespace {

namespace fs = std::filesystem;

std::string first_line(const fs::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

bool has_word(const std::string& list, std::string_view word) {
  return std::ranges::count(split(list, ','), word) > 0;
}

// Below `root`, whose "/" the absolute path means.
fs::path below(const fs::path& root, const std::string& absolute) {
  return root / fs::path(absolute).relative_path();
}

// mountinfo writes blanks and the like as \ooo.
std::string unescape(const std::string& text) {
  std::string plain;
  for (size_t i = 0; i < text.size(); ++i) {
    int code = 0;
    const char* const digits = text.data() + i + 1;
    if (text[i] == '\\' && i + 3 < text.size() &&
        std::from_chars(digits, digits + 3, code, 8).ptr == digits + 3) {
      plain += static_cast<char>(code);
      i += 3;
    } else {
      plain += text[i];
    }
  }
  return plain;
}

// ---- control groups -----------------------------------------------------------------------------

// A hierarchy of control groups that may limit CPU time, as this process sees it mounted.
struct Hierarchy {
  bool is_v2 = false;
  std::string mounted_group;  // the group that the mount point shows
  std::string mount_point;
};

// mountinfo: id parent device root mount_point options [tags] - type source super_options
std::vector<Hierarchy> cpu_hierarchies(const fs::path& root) {
  std::vector<Hierarchy> found;
  std::ifstream mounts(root / "proc/self/mountinfo");
  for (std::string line; std::getline(mounts, line);) {
    const std::vector<std::string> fields = split(line, ' ');
    const auto dash = std::ranges::find(fields, "-");
    if (fields.size() < 5 || fields.end() - dash < 4) continue;
    const bool is_v2 = dash[1] == "cgroup2";
    if (!is_v2 && !(dash[1] == "cgroup" && has_word(dash[3], "cpu"))) continue;
    found.push_back(
        {.is_v2 = is_v2, .mounted_group = unescape(fields[3]), .mount_point = unescape(fields[4])});
  }
  return found;
}

// This process's group in the hierarchy: "id:controllers:group", v2 with id 0 and no controllers.
std::optional<std::string> own_group(const fs::path& root, bool is_v2) {
  std::ifstream groups(root / "proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool matches = is_v2 ? line.starts_with("0::") : has_word(controllers, "cpu");
    if (matches) return line.substr(second + 1);
  }
  return std::nullopt;
}

std::optional<double> quotient(const std::string& quota, const std::string& period) {
  double values[2] = {};
  const std::string* texts[2] = {&quota, &period};
  for (int i = 0; i < 2; ++i) {
    const std::string& text = *texts[i];
    const auto read = std::from_chars(text.data(), text.data() + text.size(), values[i]);
    if (read.ec != std::errc() || !(values[i] > 0)) return std::nullopt;  // "max", -1, no file
  }
  return values[0] / values[1];
}

std::optional<double> granted_by(const fs::path& group, bool is_v2) {
  if (!is_v2) {
    return quotient(first_line(group / "cpu.cfs_quota_us"),
                    first_line(group / "cpu.cfs_period_us"));
  }
  const std::vector<std::string> fields = split(first_line(group / "cpu.max"), ' ');
  return fields.size() == 2 ? quotient(fields[0], fields[1]) : std::nullopt;
}

double granted_cpus(const fs::path& root) {
  double least = std::numeric_limits<double>::infinity();
  for (const Hierarchy& hierarchy : cpu_hierarchies(root)) {
    std::string group = own_group(root, hierarchy.is_v2).value_or("/");
    // Inside a container the mount may show our group, or one between it and the root, as its root;
    // where it shows another branch, the mount point is all there is to read.
    const std::string shown = hierarchy.mounted_group == "/" ? "" : hierarchy.mounted_group;
    const bool is_inside = group.starts_with(shown + "/") && group.find("/..") == group.npos;
    group = is_inside ? group.substr(shown.size()) : "/";
    const fs::path top = below(root, hierarchy.mount_point);
    for (fs::path at = fs::path(group).relative_path();; at = at.parent_path()) {
      if (const auto cpus = granted_by(top / at, hierarchy.is_v2)) least = std::min(least, *cpus);
      if (at.empty()) break;
    }
  }
  return least;
}

// "0-3,8" -> {0, 1, 2, 3, 8}; what cannot be read is left out.
std::vector<int> parse_cpu_list(const std::string& list) {
  std::vector<int> cpus;
  for (const std::string& range : split(list, ',')) {
    int first = 0, last = 0;
    const char* const end = range.data() + range.size();
    const auto low = std::from_chars(range.data(), end, first);
    if (low.ec != std::errc()) continue;
    last = first;
    if (low.ptr != end && *low.ptr == '-') std::from_chars(low.ptr + 1, end, last);
    for (int cpu = first; cpu <= std::min(last, kMaxCpus - 1); ++cpu) cpus.push_back(cpu);
  }
  return cpus;
}

// What all CPUs of a core have in common, and no other.
std::string core_of(int cpu, const fs::path& root) {
  const fs::path topology = root / fmt::format("sys/devices/system/cpu/cpu{}/topology", cpu);
  for (const char* name : {"core_cpus_list", "thread_siblings_list"}) {  // the second: before 5.3
    const std::string siblings = first_line(topology / name);
    if (!siblings.empty()) return siblings;
  }
  return std::to_string(cpu);
}

}  // namespace

int UsableCores::num_threads(int num_sharing, int num_processes) const {
  const int of_mask = num_cores / std::max(1, num_sharing);
  const double granted = std::ceil(cgroup_cpus / std::max(1, num_processes));
  return std::max(1, granted < of_mask ? static_cast<int>(granted) : of_mask);
}

std::string UsableCores::text() const {
  const std::string granted =
      std::isinf(cgroup_cpus) ? "" : fmt::format(", {:.4g} granted by control groups", cgroup_cpus);
  return fmt::format("{} CPUs on {} cores{}", num_cpus, num_cores, granted);
}

std::vector<int> affinity_cpus() {
  // The system refuses masks shorter than its own, whose length it does not tell.
  for (int capacity = CPU_SETSIZE; capacity <= kMaxCpus; capacity *= 4) {
    const size_t bytes = CPU_ALLOC_SIZE(capacity);
    std::vector<cpu_set_t> set((bytes + sizeof(cpu_set_t) - 1) / sizeof(cpu_set_t));
    if (sched_getaffinity(0, bytes, set.data()) != 0) continue;
    std::vector<int> cpus;
    for (int cpu = 0; cpu < capacity; ++cpu) {
      if (CPU_ISSET_S(cpu, bytes, set.data())) cpus.push_back(cpu);
    }
    return cpus;
  }
  return {0};
}

UsableCores read_usable_cores(const std::vector<int>& cpus, const fs::path& root) {
  std::set<std::string> cores;
  for (const int cpu : cpus) cores.insert(core_of(cpu, root));
  return {.num_cpus = static_cast<int>(cpus.size()),
          .num_cores = static_cast<int>(cores.size()),
          .cgroup_cpus = granted_cpus(root)};
}

UsableCores usable_cores() {
  return read_usable_cores(affinity_cpus());
}

CpuSharing sharing_of(const std::vector<std::vector<int>>& masks, int own) {
  const std::vector<int>& cpus = masks.at(static_cast<size_t>(own));
  CpuSharing sharing{.num_processes = 0, .index = 0};
  for (int process = 0; process < std::ssize(masks); ++process) {
    const std::vector<int>& others = masks[static_cast<size_t>(process)];
    const bool shares = process == own || std::ranges::find_first_of(cpus, others) != cpus.end();
    if (!shares) continue;
    if (process < own) ++sharing.index;
    ++sharing.num_processes;
  }
  return sharing;
}

std::vector<std::vector<int>> cpus_by_node(const std::vector<int>& cpus, const fs::path& root) {
  std::map<int, std::vector<int>> nodes;  // by number
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(root / "sys/devices/system/node", ignored)) {
    const std::string name = entry.path().filename();
    int node = 0;
    if (!name.starts_with("node") ||
        std::from_chars(name.data() + 4, name.data() + name.size(), node).ec != std::errc()) {
      continue;
    }
    std::vector<int> shared;
    std::ranges::set_intersection(cpus, parse_cpu_list(first_line(entry.path() / "cpulist")),
                                  std::back_inserter(shared));
    if (!shared.empty()) nodes[node] = std::move(shared);
  }
  std::vector<std::vector<int>> groups;
  size_t found = 0;
  for (auto& [node, members] : nodes) {
    found += members.size();
    groups.push_back(std::move(members));
  }
  if (found != cpus.size()) return {cpus};  // some belong to no node: nothing to go by
  return groups;
}

}  // namespace rollpack::kernels
