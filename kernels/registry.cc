#include "kernels/registry.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "kernels/base/error.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/reference/reference_backend.h"

namespace rollpack::kernels {
namespace {

struct Entry {
  std::string_view name;
  std::unique_ptr<Backend> (*make)(const ModelShape&, const BackendOptions&);
};

constexpr std::array kEntries = {
    Entry{"cpu", make_cpu_backend},
    Entry{"reference", make_reference_backend},
};

// Levenshtein's distance; names are a few letters long.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j - 1] + 1, diagonal + 1});
    }
  }
  return row[b.size()];
}

[[noreturn]] void refuse_name(std::string_view name) {
  std::vector<std::string> allowed = backend_names();
  allowed.insert(allowed.begin(), "auto");
  const auto nearest = std::min_element(allowed.begin(), allowed.end(),
                                        [&](const std::string& a, const std::string& b) {
                                          return edit_distance(name, a) < edit_distance(name, b);
                                        });
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = "engine.backend",
               .value = std::string(name),
               .allowed = fmt::format("{}", fmt::join(allowed, ", ")),
               .message = fmt::format("the nearest is {}", *nearest)});
}

}  // namespace

std::vector<std::string> backend_names() {
  std::vector<std::string> names;
  for (const Entry& entry : kEntries) names.emplace_back(entry.name);
  return names;
}

std::unique_ptr<Backend> make_backend(std::string_view name, const ModelShape& shape,
                                      const BackendOptions& options) {
  if (name == "auto") return kEntries.front().make(shape, options);
  for (const Entry& entry : kEntries) {
    if (entry.name == name) return entry.make(shape, options);
  }
  refuse_name(name);
}

}  // namespace rollpack::kernels
