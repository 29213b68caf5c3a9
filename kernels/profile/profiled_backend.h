// A backend around another one that times each op it forwards and counts what the op has to compute
// and to move. Results are the inner backend's, bit for bit.
//
// An op's time is that of its call, so the inner backend must do an op's work before it returns, as
// those do that compute on the host.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels/forwarding_backend.h"
#include "kernels/profile/op_profile.h"

namespace rollpack::kernels {

class ProfiledBackend final : public ForwardingBackend {
 public:
  ProfiledBackend(std::unique_ptr<Backend> inner, const ModelShape& shape);
  ~ProfiledBackend() override;

  // What was profiled since the last call. Thread-safe; a step under way is counted in part.
  StepProfile take();

  WeightId declare_weight(const WeightSpec& spec) override;
  void set_program(std::shared_ptr<StepProgram> program) override;
  StepHandle submit(StepPlan plan) override;

  void embed(const EmbedArgs& args) override;
  void rms_norm(const RmsNormArgs& args) override;
  void linear(const LinearArgs& args) override;
  void rope_append(const RopeAppendArgs& args) override;
  void attention(const AttentionArgs& args) override;
  void gather_head_rows(const GatherHeadRowsArgs& args) override;
  void lm_head(const LmHeadArgs& args) override;
  void gather_columns(const GatherColumnsOpArgs& args) override;

 private:
  class ProfiledProgram;
  // A weight by id: what it is called, without its layer, and its size.
  struct Weight {
    std::string name;
    double num_elements = 0;
  };
  // Rows of a step in flight as attention meets them.
  struct StepRows {
    std::vector<int32_t> positions;
    int64_t num_pages = 0;  // distinct ones that hold a key some row sees
  };
  struct Cost {
    int64_t num_rows = 0;
    double flops = 0;
    double bytes = 0;
  };

  template <class Call>
  void timed(const std::string& name, const Cost& cost, Call call);
  double visible_pairs(int32_t window);
  double element_bytes() const;

  const ModelShape shape_;
  std::vector<Weight> weights_;  // by WeightId
  std::mutex mutex_;             // of the members below
  std::deque<StepRows> steps_;   // submitted and not run to their end, oldest first
  StepProfile profile_;
};

}  // namespace rollpack::kernels
