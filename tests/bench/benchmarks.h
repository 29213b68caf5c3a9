// Each file of benchmarks adds its own to Google Benchmark's list.
#pragma once

namespace rollpack::bench {

void add_gemm_benchmarks();
void add_op_benchmarks();

}  // namespace rollpack::bench
