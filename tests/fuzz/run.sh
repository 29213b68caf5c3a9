#!/usr/bin/env bash
# Fuzzes what reads bytes from outside, with clang's libFuzzer and the address and undefined-
# behaviour sanitizers: tests/fuzz/run.sh [TARGET..], all by default. ROLLPACK_FUZZ_S is the time of
# each, 60 seconds by default; as many run at once as there are CPUs. New inputs go to
# build-fuzz/corpus/, what fails to build-fuzz/findings/TARGET/. Exits with 0 if nothing was found.
set -uo pipefail
cd "$(dirname "$0")/../.."
seconds=${ROLLPACK_FUZZ_S:-60}
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
  mapfile -t targets < <(sed -n 's/^add_fuzz_target(\([a-z_]*\) .*/\1/p' tests/fuzz/CMakeLists.txt)
fi
command -v clang++ >/dev/null || { echo "run.sh: clang++ is not installed" >&2; exit 2; }
tests/build.sh fuzz "${targets[@]/#/--target=fuzz_}" || exit 2

export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
# One allocation above this is a finding too: nothing may be reserved by a claimed length. All of
# them together get more, as the sanitizer keeps what was freed for a while.
max_mb=1024
export ASAN_OPTIONS=quarantine_size_mb=64

fuzz_one() {
  local name=$1 found=build-fuzz/findings/$1
  mkdir -p "$found" "build-fuzz/corpus/$name"
  local log=build-fuzz/$name.log status=0
  "build-fuzz/tests/fuzz/fuzz_$name" -max_total_time="$seconds" -max_len=8192 -timeout=10 \
    -rss_limit_mb=$((3 * max_mb)) -malloc_limit_mb=$max_mb -print_final_stats=1 \
    -artifact_prefix="$found/" "build-fuzz/corpus/$name" "tests/fuzz/corpus/$name" \
    >"$log" 2>&1 || status=$?
  if [ $status -ne 0 ]; then
    tail -40 "$log"
    echo "fuzz $name: exit status $status; inputs in $found, log in $log"
    return 1
  fi
  local runs cover
  runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
  cover=$(grep -o 'cov: [0-9]*' "$log" | tail -1)
  echo "fuzz $name: $runs inputs in $seconds s, ${cover:-cov: none}, nothing found"
}
export -f fuzz_one
export seconds max_mb
printf '%s\n' "${targets[@]}" | xargs -P "$(nproc)" -I{} bash -c 'fuzz_one {}'
