// The layouts there are. make_layout() chooses by name; the list stands in batch_layout.cc.
#pragma once

#include <memory>

#include "trainer_bridge/layout/batch_layout.h"

namespace rollpack::bridge {

// Samples one behind the other, without pads, in rows of at most max_tokens_per_row tokens.
std::unique_ptr<BatchLayout> make_packed_layout(const LayoutOptions& options);

// A row a sample: prompts padded on the left, responses on the right, to the batch's longest or
// to fixed widths.
std::unique_ptr<BatchLayout> make_padded_layout(const LayoutOptions& options);

}  // namespace rollpack::bridge
