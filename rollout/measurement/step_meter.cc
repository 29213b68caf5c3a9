#include "rollout/measurement/step_meter.h"

#include <algorithm>
#include <utility>

namespace rollpack::rollout {

StepMeter::StepMeter(const ModelConfig& model, DType dtype, const kernels::KvLayout& kv)
    : cost_(model, dtype), kv_(kv), page_marks_(kv.num_pages, 0) {}

void StepMeter::on_step(const StepWork& work) {
  const double now_s = steady_seconds();
  int64_t num_tokens = 0, num_head_tokens = work.num_scored;
  double flops = 0;
  for (const StepWork::Span& span : work.spans) {
    num_tokens += span.end - span.begin;
    flops += cost_.attention_flops(span.begin, span.end);
  }
  for (const StepWork::Draw& draw : work.draws) {
    num_head_tokens += draw.num_tokens;
    const auto [last, is_first] = last_token_s_.try_emplace(draw.arrival, now_s);
    if (is_first) {
      measured_.first_token_times_s.push_back(now_s);
    } else {
      measured_.token_gaps_s.push_back(static_cast<float>(now_s - last->second));
    }
    // Tokens accepted in one step come at one time.
    measured_.token_gaps_s.insert(measured_.token_gaps_s.end(), draw.num_tokens - 1, 0.0f);
    last->second = now_s;
    if (draw.is_last) last_token_s_.erase(last);
  }
  flops += cost_.linear_flops() * static_cast<double>(num_tokens) +
           cost_.head_flops() * static_cast<double>(num_head_tokens);
  const double weight_bytes =
      (num_tokens > 0 ? cost_.layer_bytes() : 0) + (num_head_tokens > 0 ? cost_.head_bytes() : 0);
  measured_.step_flops.push_back(static_cast<float>(flops));
  measured_.step_bytes.push_back(static_cast<float>(weight_bytes + kv_bytes(work)));
  measured_.compute_s += work.compute_s;
  measured_.largest_step_rows = std::max(measured_.largest_step_rows, work.num_rows);
  measured_.peak_pages = std::max<int64_t>(measured_.peak_pages, work.num_pages_used);
}

// Pages that the step's rows see, each once however many sequences share it.
double StepMeter::kv_bytes(const StepWork& work) {
  double bytes = 0;
  for (const auto& [window, num_layers] : cost_.windows()) {
    bytes += static_cast<double>(num_distinct_pages(work, window) * kv_.page_bytes) * num_layers /
             static_cast<double>(cost_.num_layers());
  }
  return bytes;
}

int64_t StepMeter::num_distinct_pages(const StepWork& work, int32_t window) {
  const uint64_t mark = ++num_counts_;
  int64_t count = 0;
  for (const StepWork::Span& span : work.spans) {
    const int32_t first_key = window == 0 ? 0 : std::max(0, span.begin - window + 1);
    const int32_t end = (span.end + kv_.page_tokens - 1) / kv_.page_tokens;
    for (int32_t i = first_key / kv_.page_tokens; i < end; ++i) {
      count += std::exchange(page_marks_[span.pages[i]], mark) != mark;
    }
  }
  return count;
}

Measurement StepMeter::take() {
  return std::exchange(measured_, {});
}

}  // namespace rollpack::rollout
