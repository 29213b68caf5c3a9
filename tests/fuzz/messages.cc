// A client's message: MessagePack decoded under limits, then read as every verb reads its fields.
#include <array>
#include <string>

#include "tests/fuzz/fuzz_input.h"
#include "trainer_bridge/server/requests.h"
#include "trainer_bridge/weight_inbox/manifest.h"
#include "trainer_bridge/wire/fields.h"
#include "trainer_bridge/wire/message.h"

namespace {

using namespace rollpack::bridge;
using namespace rollpack::fuzz;

template <class Read>
void read_fields(const Json& map, Read read) {
  reads_or_refuses([&] {
    Fields fields(map, "", "request");
    read(fields);
  });
}

}  // namespace

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Json map;
  if (!reads_or_refuses([&] { map = decode_message(bytes_of(data, size)); })) return 0;
  const std::vector<uint8_t> encoded = encode_message(map);
  require(encode_message(decode_message(encoded)) == encoded, "a message that changes on its way");
  read_fields(map, [](Fields& fields) { read_hello(fields); });
  read_fields(map, [](Fields& fields) { read_prompts(fields); });
  read_fields(map, [](Fields& fields) { read_next_batch(fields); });
  read_fields(map, [](Fields& fields) { read_release(fields); });
  read_fields(map, [](Fields& fields) { read_in_flight(fields); });
  read_fields(map, [](Fields& fields) { read_sequences(fields); });
  read_fields(map, [](Fields& fields) { read_manifest(fields); });
  read_fields(map, [](Fields& fields) { read_lent_manifest(fields); });
  reads_or_refuses([&] { error_from_map(map); });
  return 0;
}
