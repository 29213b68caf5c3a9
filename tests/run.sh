#!/usr/bin/env bash
# Everything: install, build, C++ tests (ctest), Python and end-to-end tests (pytest, under mpirun),
# C++ unit tests under the address/undefined sanitizers, those with threads under the thread one.
#   tests/run.sh [--full] [--no-sanitizers]
# --full runs the large sweeps too. The last line counts the tests; the exit status is 0 when all
# stages ran and nothing failed. A stage that breaks without a test result counts as one failure.
set -uo pipefail
cd "$(dirname "$0")/.."

sanitizers="asan-ubsan tsan"
export ROLLPACK_FULL=${ROLLPACK_FULL:-0}
for argument in "$@"; do
  case $argument in
    --full) ROLLPACK_FULL=1 ;;
    --no-sanitizers) sanitizers= ;;
    *) echo "run.sh: unknown argument $argument; allowed: --full, --no-sanitizers" >&2; exit 2 ;;
  esac
done

results=$PWD/build/test-results
python=$PWD/${ROLLPACK_VENV:-.venv}/bin/python
[[ ${ROLLPACK_VENV:-} != /* ]] || python=$ROLLPACK_VENV/bin/python
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export ROLLPACK_BUILD_DIR=$PWD/build
export ROLLPACK_BINARY=$ROLLPACK_BUILD_DIR/rollout/rollpack
export ROLLPACK_MODEL=${ROLLPACK_MODEL:-$PWD/models/smollm2-135m}
export ROLLPACK_PYTHON=$python PYTHONDONTWRITEBYTECODE=1
broken=()
mkdir -p "$results"
rm -f "$results"/*.xml

# stage NAME SECONDS COMMAND..: runs it under a limit, says how long it took, notes a failure.
stage() {
  local name=$1 limit_s=$2 start=$SECONDS status=0
  shift 2
  echo "== $name"
  timeout --kill-after=10 "$limit_s" "$@" || status=$?
  [ $status -ne 124 ] || echo "run.sh: $name ran past $limit_s s"
  [ $status -eq 0 ] || broken+=("$name")
  echo "== $name: exit status $status after $((SECONDS - start)) s"
  return $status
}

# ctest_stage NAME BUILD_DIR SECONDS CTEST_ARGS..
ctest_stage() {
  local name=$1 build_dir=$2 limit_s=$3
  shift 3
  stage "$name" "$limit_s" ctest --test-dir "$build_dir" -j "$(nproc)" --timeout 120 \
    --no-tests=error --output-on-failure --output-junit "$results/$name.xml" "$@"
}

finish() {
  python3 tests/count_results.py "$results" "${broken[@]}"
  exit $?
}

stage install 2400 tests/install.sh || finish
stage build 1800 env ROLLPACK_UNITY=ON tests/build.sh release || finish
if [ "$ROLLPACK_FULL" = 1 ]; then
  ctest_stage ctest build 1800
else
  ctest_stage ctest build 600 -LE "slow|perf"
fi
stage bench 300 tests/bench/run.sh --smoke
stage model 300 "$python" examples/export_smollm2.py --output "$ROLLPACK_MODEL"
stage pytest $((ROLLPACK_FULL ? 7200 : 1500)) "$python" -m pytest tests -q \
  --junit-xml "$results/pytest.xml"
stage quickstart 600 examples/quickstart.sh --steps 2 --out "$results"

# The thread sanitizer needs address-space randomization off where the kernel uses many bits of it.
run_fixed=()
if setarch "$(uname -m)" -R true 2>/dev/null; then run_fixed=(setarch "$(uname -m)" -R); fi
export ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1
export LSAN_OPTIONS=suppressions=$PWD/tests/leaks_of_others.txt:print_suppressions=0
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1
for preset in $sanitizers; do
  build_dir=build-${preset%-ubsan} label=unit targets=(--target tests/all)
  # Half of the tests share no data between threads: --full runs those too.
  if [ "$preset" = tsan ] && [ "$ROLLPACK_FULL" != 1 ]; then
    label=unit-threads targets=(--target threaded_tests)
  fi
  stage "build-$preset" 1800 tests/build.sh "$preset" "${targets[@]}" || continue
  stage "$preset" 1500 "${run_fixed[@]}" ctest --test-dir "$build_dir" -j "$(nproc)" --timeout 600 \
    --no-tests=error --output-on-failure --output-junit "$results/$preset.xml" -L "$label"
done

# Needs clang, which nothing else here does; without it the corpora were replayed all the same.
if [ "$ROLLPACK_FULL" = 1 ] && command -v clang++ >/dev/null; then
  export ROLLPACK_FUZZ_S=${ROLLPACK_FUZZ_S:-600}
  stage fuzz $((1800 + 10 * ROLLPACK_FUZZ_S)) tests/fuzz/run.sh
fi
finish
