// What `rollpack top` shows of a scrape: one screen of text.
#pragma once

#include <string>
#include <vector>

#include "rollout/metrics/scrape.h"

namespace rollpack::rollout {

struct ScreenSize {
  size_t num_lines = 24;
  size_t num_columns = 100;
};

// Lines without line ends, none beyond the size: ranks that do not fit are counted, those silent
// for longest come first. `before`: an earlier scrape, for what a rank makes a second; null:
// unknown.
std::vector<std::string> top_screen(const Scrape& now, const Scrape* before, int port,
                                    const ScreenSize& size);

}  // namespace rollpack::rollout
