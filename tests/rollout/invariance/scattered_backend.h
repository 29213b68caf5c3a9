// A cpu backend whose pages lie elsewhere than the engine thinks, in a random order, and whose
// unused page slots hold NaN: whatever a step reads beyond what its rows may see shows at once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/kv_pages.h"
#include "kernels/forwarding_backend.h"

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

class ScatteredBackend : public kernels::ForwardingBackend {
 public:
  ScatteredBackend(const kernels::ModelShape& shape, const kernels::BackendOptions& options,
                   const kernels::CpuOptions& cpu_options, uint32_t seed)
      : ForwardingBackend(
            kernels::make_cpu_backend(shape, options, poisoning(shape, cpu_options))) {
    places_.resize(static_cast<size_t>(info().kv.num_pages));
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
    return inner().submit(std::move(plan));
  }

 private:
  static kernels::CpuOptions poisoning(const kernels::ModelShape& shape,
                                       kernels::CpuOptions options) {
    options.before_rows = [shape](const kernels::StepPlan& plan,
                                  const kernels::cpu::KvPages& pages) {
      constexpr int32_t kPageTokens = 16;
      if (shape.dtype == DType::kBF16) {
        poison_unused_slots<uint16_t>(plan, pages, shape, kPageTokens);
      } else {
        poison_unused_slots<float>(plan, pages, shape, kPageTokens);
      }
    };
    return options;
  }

  std::vector<int32_t> places_;  // engine's page -> where it lies
};

}  // namespace rollpack::rollout
