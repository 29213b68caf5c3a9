// A configuration file. What was read prints as YAML that reads back as the same values.
#include <string>

#include "rollout/config/config.h"
#include "tests/fuzz/fuzz_input.h"

namespace {

using namespace rollpack::fuzz;
using namespace rollpack::rollout;

bool is_same(const Config& a, const Config& b) {
  return a.model == b.model && a.rollout == b.rollout && a.engine == b.engine &&
         a.reference_model == b.reference_model && a.bridge == b.bridge && a.cluster == b.cluster;
}

}  // namespace

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Config config;
  if (!reads_or_refuses([&] { config = parse_config(text_of(data, size), "F"); })) return 0;
  config_json(config);
  for (const bool with_comments : {false, true}) {
    const std::string printed = config_yaml(config, with_comments);
    require(is_same(config, parse_config(printed, "F")), "a configuration that changes in print");
  }
  return 0;
}
