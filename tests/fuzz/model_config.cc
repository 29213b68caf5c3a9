// config.json, and behind a NUL generation_config.json, of a model folder.
#include "rollout/model/model_config.h"

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "tests/fuzz/fuzz_input.h"

namespace {

using namespace rollpack::fuzz;

class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "rollpack-fuzz-XXXXXX").string();
    require(::mkdtemp(name.data()) != nullptr, "no temporary folder");
    path_ = name;
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  const std::string& path() const { return path_; }
  void write(const char* name, std::string_view text) const {
    std::ofstream file(path_ + "/" + name, std::ios::binary);
    file.write(text.data(), static_cast<std::streamsize>(text.size()));
  }
  void remove(const char* name) const { std::filesystem::remove(path_ + "/" + name); }

 private:
  std::string path_;
};

}  // namespace

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Folder folder;
  const std::string_view text = text_of(data, size);
  const size_t nul = text.find('\0');
  folder.write("config.json", text.substr(0, nul));
  if (nul == std::string_view::npos) {
    folder.remove("generation_config.json");
  } else {
    folder.write("generation_config.json", text.substr(nul + 1));
  }
  reads_or_refuses([] {
    const auto config = rollpack::rollout::read_model_config(folder.path());
    require(config.hidden_size > 0 && config.vocab_size > 0 && config.num_hidden_layers > 0 &&
                config.num_attention_heads % config.num_key_value_heads == 0,
            "a shape that no model has");
    require(config.attention_parity_tokens() >= 0, "a cost below nothing");
  });
  return 0;
}
