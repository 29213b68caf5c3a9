// A batch drawn as SVG, for a browser or a report: the elements of class prompt, response, loss,
// pad and attention say the same as the columns do.
#pragma once

#include <string>

#include "trainer_bridge/inspection/batch_labels.h"

namespace rollpack::bridge {

// One SVG 1.1 document. A group `row` for each drawn row holds a `prompt` and a `response` for each
// sample that has such tokens, a `loss` for each run of them in the loss, a `pad` for each run of
// pads, and an `attention` triangle for each sample that has tokens; `title` elements say which.
// Errors: those of drawn_rows().
std::string svg_drawing(const BatchTable& table, const BatchContents& contents,
                        const std::string& state, const DrawingOptions& options);

}  // namespace rollpack::bridge
