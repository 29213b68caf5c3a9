// NCCL, opened when it is first needed: a program with CUDA in it starts where there is none. The
// types are those of nccl.h as far as they are used here, unchanged since non-blocking
// communicators came (2.14).
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <string>

namespace rollpack::kernels::cuda {

struct NcclId {
  std::array<char, 128> bytes{};
};

struct NcclComm;  // ncclComm_t is a pointer to one

enum class NcclResult : int { kSuccess = 0, kInProgress = 7 };  // all others are errors
enum class NcclType : int { kU8 = 1, kI32 = 2, kU32 = 3, kI64 = 4, kU64 = 5, kF32 = 7, kF64 = 8 };
enum class NcclOp : int { kSum = 0, kMax = 2, kMin = 3 };

// ncclConfig_t as of 2.14: the library fills in what later versions have added.
struct NcclConfig {
  size_t size = sizeof(NcclConfig);
  unsigned magic = 0xcafebeef;
  unsigned version = 21400;
  int blocking = 0;
};

class NcclLibrary {
 public:
  // `file` as dlopen() takes it. Errors: unsupported naming the file and what dlopen() said of it,
  // or the function that it lacks, with its version.
  // It stays open until the process ends: NCCL has threads of its own.
  explicit NcclLibrary(const std::string& file = "libnccl.so.2");
  NcclLibrary(const NcclLibrary&) = delete;
  NcclLibrary& operator=(const NcclLibrary&) = delete;

  // One copy for the process, opened by the first call. Errors: as above.
  static std::shared_ptr<const NcclLibrary> shared();

  int version() const { return version_; }  // 22809 for 2.28.9
  std::string version_text() const;         // "NCCL 2.28.9"
  NcclId make_id() const;                   // Errors: unavailable
  // What NCCL says of a result, and of the last error of a communicator, or of any where that is
  // null.
  std::string text_of(NcclResult result, NcclComm* comm = nullptr) const;

  // The library's own functions, by their names without "nccl".
  NcclResult (*comm_init_rank_config)(NcclComm**, int num_ranks, NcclId, int rank, NcclConfig*);
  NcclResult (*comm_get_async_error)(NcclComm*, NcclResult*);
  NcclResult (*comm_abort)(NcclComm*);
  NcclResult (*all_gather)(const void* send, void* receive, size_t count, NcclType, NcclComm*,
                           void* stream);
  NcclResult (*all_reduce)(const void* send, void* receive, size_t count, NcclType, NcclOp,
                           NcclComm*, void* stream);
  NcclResult (*broadcast)(const void* send, void* receive, size_t count, NcclType, int root,
                          NcclComm*, void* stream);

 private:
  template <class Function>
  void find(Function*& function, const char* name);

  const std::string file_;
  void* handle_ = nullptr;
  int version_ = 0;
  NcclResult (*get_version_)(int*) = nullptr;
  NcclResult (*get_unique_id_)(NcclId*) = nullptr;
  const char* (*get_error_string_)(NcclResult) = nullptr;
  const char* (*get_last_error_)(NcclComm*) = nullptr;
};

}  // namespace rollpack::kernels::cuda
