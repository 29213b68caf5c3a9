// A folder of this run alone, below TMPDIR (else /tmp), for as long as this lives.
#pragma once

#include <string>

namespace rollpack::rollout {

class PrivateFolder {
 public:
  // Errors: unavailable, naming TMPDIR, where nothing can be made.
  PrivateFolder();
  ~PrivateFolder();  // with all that is in it
  PrivateFolder(const PrivateFolder&) = delete;
  PrivateFolder& operator=(const PrivateFolder&) = delete;

  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace rollpack::rollout
