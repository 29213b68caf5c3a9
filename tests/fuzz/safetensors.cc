// A .safetensors file: its header, and the first bytes of each tensor that it says it has.
#include "rollout/model/safetensors.h"

#include <algorithm>
#include <array>
#include <span>

#include "tests/fuzz/input_file.h"

namespace {

using namespace rollpack::fuzz;
using namespace rollpack::rollout;

void read_start(const SafetensorsFile& file, size_t index) {
  std::array<std::byte, 16> buffer;
  const auto bytes = std::min<size_t>(buffer.size(), file.tensors()[index].bytes);
  file.read(index, 0, std::span(buffer).first(bytes));
  file.read(index, file.tensors()[index].bytes, {});
}

}  // namespace

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const InputFile input(data, size);
  reads_or_refuses([&] {
    const SafetensorsFile file(input.path());
    int64_t total = 0;
    for (size_t i = 0; i < file.tensors().size(); ++i) {
      const TensorInfo& tensor = file.tensors()[i];
      require(!__builtin_add_overflow(total, tensor.bytes, &total), "more bytes than 2^63");
      require(total < static_cast<int64_t>(size), "tensors larger than their file");
      reads_or_refuses([&] { read_start(file, i); });
    }
  });
  return 0;
}
