// A batch drawn with characters, for a terminal.
#pragma once

#include <string>

#include "trainer_bridge/inspection/batch_labels.h"

namespace rollpack::bridge {

// Summary, table of columns, a bar a row; with rows chosen also their samples, and the attention
// mask of each; otherwise that of the first. Lines end in '\n' and fit options.width, 40 or more,
// but for those that quote a path.
// Errors: those of drawn_rows().
std::string text_drawing(const BatchTable& table, const BatchContents& contents,
                         const std::string& state, const DrawingOptions& options);

}  // namespace rollpack::bridge
