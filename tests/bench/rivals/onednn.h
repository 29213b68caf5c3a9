// The same product in oneDNN, bf16 x bf16 -> f32, weights reordered to the layout it asks for.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace rollpack::bench {

class OneDnnGemm {
 public:
  // Reorders num_weights matrices of `weight` [N, K_in] bf16 for inputs of `rows` rows.
  OneDnnGemm(int64_t rows, int64_t N, int64_t K_in, const std::vector<uint16_t>& weight,
             int num_weights, int num_threads);
  ~OneDnnGemm();

  // out [rows, N] f32 = in [rows, K_in] bf16 x every weight, one after the other.
  // Returns: seconds of all of them together.
  double run(const uint16_t* in, float* out);

  // "oneDNN 2.6.3", and the implementation it chose for this shape.
  static std::string version();
  std::string implementation() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace rollpack::bench
