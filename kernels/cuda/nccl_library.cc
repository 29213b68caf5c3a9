#include "kernels/cuda/nccl_library.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include "kernels/base/error.h"

namespace rollpack::kernels::cuda {
namespace {

constexpr int kOldestVersion = 21400;  // the first with non-blocking communicators

std::string text_of_version(int version) {
  return fmt::format("NCCL {}.{}.{}", version / 10000, version / 100 % 100, version % 100);
}

[[noreturn]] void fail_missing(const std::string& file, std::string message) {
  throw Error({.code = ErrorCode::kUnsupported,
               .field = "NCCL",
               .value = file,
               .allowed = fmt::format("{} or later", text_of_version(kOldestVersion)),
               .message = std::move(message)});
}

}  // namespace

NcclLibrary::NcclLibrary(const std::string& file) : file_(file) {
  handle_ = ::dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle_ == nullptr) {
    const char* const reason = ::dlerror();
    fail_missing(file, reason == nullptr ? "it cannot be opened" : reason);
  }
  try {
    find(get_version_, "ncclGetVersion");
    if (get_version_(&version_) != NcclResult::kSuccess || version_ < kOldestVersion) {
      fail_missing(file, fmt::format("it is {}, too old for communicators that do not block",
                                     text_of_version(version_)));
    }
    find(get_unique_id_, "ncclGetUniqueId");
    find(get_error_string_, "ncclGetErrorString");
    find(get_last_error_, "ncclGetLastError");
    find(comm_init_rank_config, "ncclCommInitRankConfig");
    find(comm_get_async_error, "ncclCommGetAsyncError");
    find(comm_abort, "ncclCommAbort");
    find(all_gather, "ncclAllGather");
    find(all_reduce, "ncclAllReduce");
    find(broadcast, "ncclBroadcast");
  } catch (...) {
    ::dlclose(handle_);
    throw;
  }
}

template <class Function>
void NcclLibrary::find(Function*& function, const char* name) {
  function = reinterpret_cast<Function*>(::dlsym(handle_, name));
  if (function != nullptr) return;
  fail_missing(file_, fmt::format("{}has no {}",
                                  version_ > 0 ? text_of_version(version_) + " " : "it ", name));
}

std::shared_ptr<const NcclLibrary> NcclLibrary::shared() {
  static const auto library = std::make_shared<const NcclLibrary>();
  return library;
}

std::string NcclLibrary::version_text() const {
  return text_of_version(version_);
}

NcclId NcclLibrary::make_id() const {
  NcclId id;
  const NcclResult result = get_unique_id_(&id);
  if (result == NcclResult::kSuccess) return id;
  throw Error(
      {.code = ErrorCode::kUnavailable, .field = "ncclGetUniqueId", .message = text_of(result)});
}

std::string NcclLibrary::text_of(NcclResult result, NcclComm* comm) const {
  const char* const last = get_last_error_(comm);
  std::string text = get_error_string_(result);
  if (last != nullptr && *last != '\0') text += fmt::format(" ({})", last);
  return text;
}

}  // namespace rollpack::kernels::cuda
