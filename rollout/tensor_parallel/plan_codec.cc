#include "rollout/tensor_parallel/plan_codec.h"

#include "kernels/base/error.h"
#include "rollout/tensor_parallel/plain_bytes.h"

namespace rollpack::rollout {
namespace {

// What a SlotInit is beside its stop ids.
struct PlainSlot {
  int32_t slot, next_position, min_position, end_position;
  kernels::SamplingParams sampling;
  uint64_t seed, prompt_hash;
  uint32_t sample_index, unused;
};

}  // namespace

void encode_plan(const kernels::StepPlan& plan, std::vector<uint8_t>& out) {
  PlainWriter writer(out);
  writer.list(plan.page_copies);
  writer.value(static_cast<uint64_t>(plan.slot_inits.size()));
  for (const kernels::SlotInit& init : plan.slot_inits) {
    writer.value(PlainSlot{.slot = init.slot,
                           .next_position = init.next_position,
                           .min_position = init.min_position,
                           .end_position = init.end_position,
                           .sampling = init.sampling,
                           .seed = init.seed,
                           .prompt_hash = init.prompt_hash,
                           .sample_index = init.sample_index,
                           .unused = 0});
    writer.list(init.stop_token_ids);
  }
  writer.list(plan.input_ids);
  writer.list(plan.positions);
  writer.list(plan.sequences);
  writer.list(plan.page_tables);
  writer.list(plan.samples);
  writer.list(plan.scores);
  writer.value(static_cast<uint8_t>(plan.wants_entropy));
}

kernels::StepPlan decode_plan(std::span<const uint8_t> bytes) {
  PlainReader reader(bytes, "step plan");
  kernels::StepPlan plan;
  plan.page_copies = reader.list<kernels::PageCopy>();
  const auto num_slots = reader.value<uint64_t>();
  for (uint64_t i = 0; i < num_slots; ++i) {
    const auto plain = reader.value<PlainSlot>();
    plan.slot_inits.push_back({.slot = plain.slot,
                               .sampling = plain.sampling,
                               .seed = plain.seed,
                               .prompt_hash = plain.prompt_hash,
                               .sample_index = plain.sample_index,
                               .next_position = plain.next_position,
                               .min_position = plain.min_position,
                               .end_position = plain.end_position,
                               .stop_token_ids = reader.list<int32_t>()});
  }
  plan.input_ids = reader.list<int32_t>();
  plan.positions = reader.list<int32_t>();
  plan.sequences = reader.list<kernels::StepSequence>();
  plan.page_tables = reader.list<int32_t>();
  plan.samples = reader.list<kernels::SampleRow>();
  plan.scores = reader.list<kernels::ScoreRow>();
  plan.wants_entropy = reader.value<uint8_t>() != 0;
  reader.finish();
  return plan;
}

}  // namespace rollpack::rollout
