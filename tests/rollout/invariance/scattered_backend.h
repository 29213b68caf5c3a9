// A cpu backend whose pages lie elsewhere than the engine thinks, in a random order, and whose
// unused page slots hold NaN: whatever a step reads beyond what its rows may see shows at once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/kv_pages.h"

namespace rollpack::rollout {

// Fills slots [first_slot, page_tokens) of a page with NaN. Padding between heads stays 0, as the
// layout promises.
template <class Element>
void fill_with_nan(const kernels::cpu::KvPages& pages, const kernels::ModelShape& shape,
                   int32_t page, int32_t first_slot, int32_t page_tokens) {
  const Element nan = sizeof(Element) == 2
                          ? static_cast<Element>(0x7FC0)
                          : static_cast<Element>(std::numeric_limits<float>::quiet_NaN());
  const std::vector<Element> row(static_cast<size_t>(shape.K), nan);
  for (int64_t layer = 0; layer < shape.L; ++layer) {
    for (int64_t head = 0; head < shape.G; ++head) {
      for (int32_t slot = first_slot; slot < page_tokens; ++slot) {
        pages.write<Element>(page, layer, head, slot, row.data(), row.data());
      }
    }
  }
}

// A page whose first slot is written starts a life: nothing in it is of use. Behind what a copy
// brings, nothing is either.
template <class Element>
void poison_unused_slots(const kernels::StepPlan& plan, const kernels::cpu::KvPages& pages,
                         const kernels::ModelShape& shape, int32_t page_tokens) {
  for (const kernels::PageCopy& copy : plan.page_copies) {
    fill_with_nan<Element>(pages, shape, copy.target, copy.num_tokens, page_tokens);
  }
  for (const kernels::StepSequence& sequence : plan.sequences) {
    for (int32_t row = sequence.row_begin; row < sequence.row_begin + sequence.num_rows; ++row) {
      const int32_t position = plan.positions[static_cast<size_t>(row)];
      if (position < 0 || position % page_tokens != 0) continue;
      const int32_t entry = sequence.page_table_begin + position / page_tokens;
      fill_with_nan<Element>(pages, shape, plan.page_tables[static_cast<size_t>(entry)], 0,
                             page_tokens);
    }
  }
}

class ScatteredBackend : public kernels::Backend {
 public:
  ScatteredBackend(const kernels::ModelShape& shape, const kernels::BackendOptions& options,
                   kernels::CpuOptions cpu_options, uint32_t seed) {
    cpu_options.before_rows = [shape](const kernels::StepPlan& plan,
                                      const kernels::cpu::KvPages& pages) {
      constexpr int32_t kPageTokens = 16;
      if (shape.dtype == DType::kBF16) {
        poison_unused_slots<uint16_t>(plan, pages, shape, kPageTokens);
      } else {
        poison_unused_slots<float>(plan, pages, shape, kPageTokens);
      }
    };
    inner_ = kernels::make_cpu_backend(shape, options, cpu_options);
    places_.resize(static_cast<size_t>(inner_->info().kv.num_pages));
    std::iota(places_.begin(), places_.end(), 0);
    std::ranges::shuffle(places_, std::mt19937(seed));
  }

  kernels::StepHandle submit(kernels::StepPlan plan) override {
    const auto place = [&](int32_t page) { return places_.at(static_cast<size_t>(page)); };
    for (kernels::PageCopy& copy : plan.page_copies) {
      copy.source = place(copy.source);
      copy.target = place(copy.target);
    }
    for (int32_t& page : plan.page_tables) page = place(page);
    return inner_->submit(std::move(plan));
  }
  bool poll(kernels::StepHandle handle) override { return inner_->poll(handle); }
  kernels::StepResult wait(kernels::StepHandle handle, kernels::Deadline deadline) override {
    return inner_->wait(handle, deadline);
  }
  void set_program(std::shared_ptr<kernels::StepProgram> program) override {
    inner_->set_program(std::move(program));
  }
  const kernels::BackendInfo& info() const override { return inner_->info(); }

  kernels::Buffer alloc(int64_t bytes) override { return inner_->alloc(bytes); }
  void free(kernels::Buffer buffer) override { inner_->free(buffer); }
  void upload(kernels::Buffer target, const void* source, int64_t bytes) override {
    inner_->upload(target, source, bytes);
  }
  void download(void* target, kernels::Buffer source, int64_t bytes) override {
    inner_->download(target, source, bytes);
  }
  void sync() override { inner_->sync(); }

  kernels::WeightId declare_weight(const kernels::WeightSpec& spec) override {
    return inner_->declare_weight(spec);
  }
  void begin_staging() override { inner_->begin_staging(); }
  void load_weight(kernels::WeightId id, int32_t part, const kernels::ConstTensor& source,
                   kernels::ShardRange shard) override {
    inner_->load_weight(id, part, source, shard);
  }
  void copy_committed_to_staged() override { inner_->copy_committed_to_staged(); }
  void commit_weights() override { inner_->commit_weights(); }
  void discard_weights() override { inner_->discard_weights(); }
  uint64_t weights_hash() override { return inner_->weights_hash(); }
  int export_staged_weights() override { return inner_->export_staged_weights(); }
  void adopt_staged_weights(int fd) override { inner_->adopt_staged_weights(fd); }
  void sleep(const std::vector<std::string>& tags) override { inner_->sleep(tags); }
  void wake_up(const std::vector<std::string>& tags) override { inner_->wake_up(tags); }

  void embed(const kernels::EmbedArgs& args) override { inner_->embed(args); }
  void rms_norm(const kernels::RmsNormArgs& args) override { inner_->rms_norm(args); }
  void linear(const kernels::LinearArgs& args) override { inner_->linear(args); }
  void rope_append(const kernels::RopeAppendArgs& args) override { inner_->rope_append(args); }
  void attention(const kernels::AttentionArgs& args) override { inner_->attention(args); }
  void gather_head_rows(const kernels::GatherHeadRowsArgs& args) override {
    inner_->gather_head_rows(args);
  }
  void lm_head(const kernels::LmHeadArgs& args) override { inner_->lm_head(args); }

 private:
  std::unique_ptr<kernels::Backend> inner_;
  std::vector<int32_t> places_;  // engine's page -> where it lies
};

}  // namespace rollpack::rollout
