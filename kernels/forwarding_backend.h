// A backend around another one that hands every call on as it is: the base of those that watch or
// change some of the calls. A new member of Backend is forwarded here, once.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.h"

namespace rollpack::kernels {

class ForwardingBackend : public Backend {
 public:
  explicit ForwardingBackend(std::unique_ptr<Backend> inner) : inner_(std::move(inner)) {}

  const BackendInfo& info() const override { return inner_->info(); }

  Buffer alloc(int64_t bytes) override { return inner_->alloc(bytes); }
  void free(Buffer buffer) override { inner_->free(buffer); }
  void upload(Buffer target, const void* source, int64_t bytes) override {
    inner_->upload(target, source, bytes);
  }
  void download(void* target, Buffer source, int64_t bytes) override {
    inner_->download(target, source, bytes);
  }
  void sync() override { inner_->sync(); }

  WeightId declare_weight(const WeightSpec& spec) override { return inner_->declare_weight(spec); }
  void begin_staging() override { inner_->begin_staging(); }
  using Backend::load_weight;
  void load_weight(WeightId id, int32_t part, const WeightSource& source,
                   ShardRange shard) override {
    inner_->load_weight(id, part, source, shard);
  }
  void copy_committed_to_staged() override { inner_->copy_committed_to_staged(); }
  void commit_weights() override { inner_->commit_weights(); }
  void discard_weights() override { inner_->discard_weights(); }
  uint64_t weights_hash() override { return inner_->weights_hash(); }
  uint64_t staged_weights_hash() override { return inner_->staged_weights_hash(); }
  int export_staged_weights() override { return inner_->export_staged_weights(); }
  void adopt_staged_weights(int fd) override { inner_->adopt_staged_weights(fd); }

  void sleep(int level) override { inner_->sleep(level); }
  void wake_up(MemoryTags tags) override { inner_->wake_up(tags); }
  int64_t held_bytes() const override { return inner_->held_bytes(); }
  double communication_s() const override { return inner_->communication_s(); }

  void set_program(std::shared_ptr<StepProgram> program) override {
    inner_->set_program(std::move(program));
  }
  StepHandle submit(StepPlan plan) override { return inner_->submit(std::move(plan)); }
  bool poll(StepHandle handle) override { return inner_->poll(handle); }
  StepResult wait(StepHandle handle, Deadline deadline) override {
    return inner_->wait(handle, deadline);
  }

  void embed(const EmbedArgs& args) override { inner_->embed(args); }
  void rms_norm(const RmsNormArgs& args) override { inner_->rms_norm(args); }
  void linear(const LinearArgs& args) override { inner_->linear(args); }
  void rope_append(const RopeAppendArgs& args) override { inner_->rope_append(args); }
  void attention(const AttentionArgs& args) override { inner_->attention(args); }
  void gather_head_rows(const GatherHeadRowsArgs& args) override { inner_->gather_head_rows(args); }
  void lm_head(const LmHeadArgs& args) override { inner_->lm_head(args); }
  void gather_columns(const GatherColumnsOpArgs& args) override { inner_->gather_columns(args); }

 protected:
  Backend& inner() { return *inner_; }

 private:
  std::unique_ptr<Backend> inner_;
};

}  // namespace rollpack::kernels
