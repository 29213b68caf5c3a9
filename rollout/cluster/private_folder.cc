#include "rollout/cluster/private_folder.h"

#include <cstdlib>
#include <filesystem>
#include <system_error>

#include "kernels/base/error.h"

namespace rollpack::rollout {

PrivateFolder::PrivateFolder() {
  const char* base = std::getenv("TMPDIR");
  path_ = std::string(base != nullptr ? base : "/tmp") + "/rollpack-XXXXXX";
  if (::mkdtemp(path_.data()) == nullptr) {
    throw Error({.code = ErrorCode::kUnavailable,
                 .field = "TMPDIR",
                 .value = path_,
                 .allowed = "a folder that can be written"});
  }
}

PrivateFolder::~PrivateFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace rollpack::rollout
