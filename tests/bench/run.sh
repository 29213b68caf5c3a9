#!/usr/bin/env bash
# Builds bench_kernels, which nothing else builds, and runs it:
#   tests/bench/run.sh [--smoke] [Google Benchmark's options, such as --benchmark_filter=gemm]
# --smoke only checks that every benchmark works, in seconds; all of them take some minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
tests/build.sh release --target bench_kernels >&2
exec build/tests/bench/bench_kernels "$@"
