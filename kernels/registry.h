// Makes a backend by name. Callers never see an #ifdef.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/backend.h"

namespace rollpack::kernels {

// Names make_backend accepts besides "auto", best first.
std::vector<std::string> backend_names();

// What a name stands for on this machine.
struct BackendChoice {
  std::string name;         // of a backend; `auto` is the first that can run
  std::string passed_over;  // what "auto" could not take, and why; empty if nothing
};

// Errors: invalid_argument for a name that is not built in.
BackendChoice choose_backend(std::string_view name);

// "auto" takes the best backend this machine can run. Allocates KV pages and slots.
// Errors: invalid_argument for a name that is not built in; unsupported, with the reason, for a
// model the backend cannot run; resource_exhausted with the bytes needed.
std::unique_ptr<Backend> make_backend(std::string_view name, const ModelShape& shape,
                                      const BackendOptions& options);

// What ranks that hold one model together need for their devices to reach each other: one makes it,
// and all are given it as BackendOptions::device_link.
struct DeviceLink {
  std::vector<std::byte> bytes;  // empty: they go through host memory
  std::string why_none;          // where a better way would be wanted
};

// `backend`: a name that choose_backend() gives.
DeviceLink make_device_link(std::string_view backend);

}  // namespace rollpack::kernels
