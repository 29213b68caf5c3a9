// Rotary position embeddings as a table, so that one rounding, not a device's sine, decides them.
#pragma once

#include <cstdint>
#include <vector>

#include "rollout/model/model_config.h"

namespace rollpack::rollout {

// The rotation speed of pair i in radians a position, [head_dim / 2] f64.
// Source: Su et al., "RoFormer", arXiv:2104.09864; linear: Chen et al., arXiv:2306.15595; llama3:
// the wavelength rule of Llama 3.1's reference code. Pairs are (i, i + head_dim / 2).
std::vector<double> rope_frequencies(const RopeConfig& rope, int64_t head_dim);

// Cosines and sines of every position.
//   result  [num_positions, head_dim] f32: cos in [0, K / 2), sin in [K / 2, K)
// Numerics: frequency and angle = position * frequency in f64, cosine and sine rounded once to f32.
// The f32 are those of powl, cosl and sinl, of 64-bit mantissa: glibc's f64 versions pick FMA code
// by CPU and may differ in the last bit between machines, so they serve only where that bit is of
// no matter. 16 ms for 32,768 positions of width 64.
std::vector<float> make_rope_table(const RopeConfig& rope, int64_t head_dim, int64_t num_positions);

}  // namespace rollpack::rollout
