// An output file that appears whole or not at all: written beside its target, renamed over it on
// commit(). A run that fails or is killed leaves the old file, or none.
#pragma once

#include <string>
#include <string_view>

#include "rollout/jsonl/file_descriptor.h"

namespace rollpack::rollout {

class WholeFile {
 public:
  // "-" and /dev/stdout are standard output, and what is no regular file (a FIFO, /dev/null) is
  // written as it is: there is nothing to rename. A symbolic link's target is what gets replaced.
  // Errors: invalid_argument for a folder, not_found for a missing one; unavailable otherwise.
  explicit WholeFile(const std::string& path);
  // Removes the temporary where commit() was not called or failed.
  ~WholeFile();
  WholeFile(const WholeFile&) = delete;
  WholeFile& operator=(const WholeFile&) = delete;

  // Buffered. Errors: resource_exhausted (disk full, file size limit) or unavailable.
  void write(std::string_view bytes);
  // Writes what is buffered, syncs file and folder, renames. Call once, last.
  void commit();

 private:
  void flush();
  [[noreturn]] void fail(std::string_view action, int error) const;

  std::string path_;            // as the user wrote it, for errors
  std::string target_;          // links resolved
  std::string temporary_path_;  // empty: written directly, or renamed already
  FileDescriptor fd_;
  std::string buffer_;
};

}  // namespace rollpack::rollout
