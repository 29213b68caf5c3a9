// The file a journal lives in, as an interface so that tests can have it fail, tear and forget.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::rollout {

// Used by one thread. After an error nothing may be called again: what is on disk is unknown.
class JournalStorage {
 public:
  virtual ~JournalStorage() = default;

  // All of it; empty where it is new.
  virtual std::string read() = 0;
  virtual void append(std::string_view bytes) = 0;
  // What was appended is on disk when it returns.
  virtual void sync() = 0;
  // All of it becomes `bytes` or, after a crash, stays as it was; on disk when it returns.
  virtual void replace(std::string_view bytes) = 0;
};

class JournalFile final : public JournalStorage {
 public:
  // Opens or creates the file (0600, a missing folder 0700) and locks it against other jobs for the
  // life of this object.
  // Errors: failed_precondition where another process has it; invalid_argument for a folder, or
  // what is no file; unavailable where it cannot be opened. All name cluster.journal.
  explicit JournalFile(std::string path);

  // Errors: resource_exhausted where the disk or a limit is full; unavailable otherwise.
  std::string read() override;
  void append(std::string_view bytes) override;
  void sync() override;
  void replace(std::string_view bytes) override;

 private:
  [[noreturn]] void fail(const char* call, int error) const;
  void write_all(int fd, std::string_view bytes) const;

  const std::string path_;
  bridge::OwnedFd fd_;
};

}  // namespace rollpack::rollout
