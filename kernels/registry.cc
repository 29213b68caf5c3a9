#include "kernels/registry.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "kernels/base/error.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/reference/reference_backend.h"
#ifdef ROLLPACK_HAS_CUDA
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/cudart_device.h"
#include "kernels/cuda/device_link.h"
#endif

namespace rollpack::kernels {
namespace {

struct Entry {
  std::string_view name;
  std::unique_ptr<Backend> (*make)(const ModelShape&, const BackendOptions&);
  std::string (*why_not)();  // why this machine cannot run it; empty where it can
};

std::string runs_anywhere() {
  return "";
}

#ifdef ROLLPACK_HAS_CUDA
std::unique_ptr<Backend> make_cuda(const ModelShape& shape, const BackendOptions& options) {
  return make_cuda_backend(cuda::make_cudart_device(options.rank_on_node), shape, options);
}
#endif

constexpr std::array kEntries = {
#ifdef ROLLPACK_HAS_CUDA
    Entry{"cuda", make_cuda, cuda::why_no_device},
#endif
    Entry{"cpu", make_cpu_backend, runs_anywhere},
    Entry{"reference", make_reference_backend, runs_anywhere},
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
  if (name == "cuda") {
    throw Error({.code = ErrorCode::kUnsupported,
                 .field = "engine.backend",
                 .value = "cuda",
                 .allowed = fmt::format("{}", fmt::join(backend_names(), ", ")),
                 .message = "this program was built without CUDA: configure with "
                            "-DROLLPACK_CUDA=ON where nvcc is found"});
  }
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

BackendChoice choose_backend(std::string_view name) {
  BackendChoice choice;
  for (const Entry& entry : kEntries) {
    if (entry.name == name) return {.name = std::string(name)};
    if (name != "auto") continue;
    const std::string reason = entry.why_not();
    if (reason.empty()) {
      choice.name = entry.name;
      return choice;
    }
    choice.passed_over +=
        fmt::format("{}{}: {}", choice.passed_over.empty() ? "" : "; ", entry.name, reason);
  }
  refuse_name(name);
}

DeviceLink make_device_link([[maybe_unused]] std::string_view backend) {
#ifdef ROLLPACK_HAS_CUDA
  if (backend == "cuda") {
    try {
      return {.bytes = cuda::make_nccl_link(), .why_none = ""};
    } catch (const Error& error) {
      return {.bytes = {}, .why_none = error.what()};
    }
  }
#endif
  return {};
}

std::unique_ptr<Backend> make_backend(std::string_view name, const ModelShape& shape,
                                      const BackendOptions& options) {
  const std::string chosen = choose_backend(name).name;
  const auto* const entry =
      std::find_if(kEntries.begin(), kEntries.end(),
                   [&](const Entry& candidate) { return candidate.name == chosen; });
  return entry->make(shape, options);
}

}  // namespace rollpack::kernels
