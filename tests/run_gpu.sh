#!/usr/bin/env bash
# Tests and measures the CUDA backend on a machine with a GPU, without network or toolkit.
#   tests/run_gpu.sh [--minutes N] [--output FILE]   here, or in an unpacked bundle
#   tests/run_gpu.sh --bundle FILE.tar.gz            packs all that it needs, at most 60 MiB
# FILE (out/gpu.jsonl) gets one JSON object a line as it goes: the device, each test of the backend,
# each measurement. Without a usable device it says so and ends well. The last line is the verdict.
set -euo pipefail
cd "$(dirname "$0")/.."

minutes=8 output=out/gpu.jsonl bundle=
while [ $# -gt 0 ]; do
  case $1 in
    --minutes) minutes=$2 ;;
    --output) output=$2 ;;
    --bundle) bundle=$2 ;;
    *) echo "run_gpu.sh: unknown argument $1; see the head of this file" >&2; exit 2 ;;
  esac
  shift 2
done

programs=(tests/kernels/test_kernels tests/rollout/test_rollout_steps_ahead)
if [ -x bin/bench_gpu ]; then  # a bundle
  tests=("${programs[@]/#*\//bin/}") bench=bin/bench_gpu
  export LD_LIBRARY_PATH=$PWD/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
else
  tests/build.sh release --target "${programs[@]##*/}" bench_gpu >&2
  tests=("${programs[@]/#/build/}") bench=build/tests/bench/gpu/bench_gpu
fi

if [ -n "$bundle" ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  mkdir -p "$folder"/rollpack_gpu/{bin,lib,tests}
  cp "${tests[@]}" "$bench" "$folder/rollpack_gpu/bin/"
  strip "$folder"/rollpack_gpu/bin/*
  # Libraries that a bare machine may lack; the C library and the driver are its own.
  ldd "${tests[@]}" "$bench" | awk '/=> \//{print $3}' | sort -u |
    grep -vE '/(libc|libm|libdl|libpthread|librt|ld-linux[^/]*|libcuda)\.so' |
    xargs -r cp -L -t "$folder/rollpack_gpu/lib"
  cp tests/run_gpu.sh "$folder/rollpack_gpu/tests/"
  tar -C "$folder" -czf "$bundle" rollpack_gpu
  bytes=$(stat -c %s "$bundle")
  echo "$bundle: $bytes bytes"
  if [ "$bytes" -gt $((60 * 1024 * 1024)) ]; then
    echo "run_gpu.sh: the bundle is above 60 MiB" >&2
    exit 1
  fi
  exit 0
fi

mkdir -p "$(dirname "$output")"
status=0
"$bench" --probe >"$output" || status=$?
cat "$output"
[ $status -ne 3 ] || exit 0  # no device: the line says why
[ $status -eq 0 ] || exit $status

deadline=$((SECONDS + minutes * 60))
passed=0 failed=0
# A test at a time, so that a device that is lost takes one with it.
mapfile -t names < <(for program in "${tests[@]}"; do
  "$program" --gtest_list_tests | awk -v program="$program" '
    /^[^ ]/ { suite = $1 }
    /GetParam\(\) = "cuda"$/ { print program " " suite $1 }'
done)
for program_and_name in "${names[@]}"; do
  program=${program_and_name% *} name=${program_and_name#* }
  [ $SECONDS -lt $deadline ] || break
  begin=$(date +%s%3N) result=ok
  timeout 120 "$program" --gtest_filter="$name" --gtest_brief=1 >"$output.test" 2>&1 ||
    result=failed
  printf '{"test": "%s", "result": "%s", "ms": %d}\n' "$name" "$result" \
    $(($(date +%s%3N) - begin)) >>"$output"
  if [ $result = ok ]; then passed=$((passed + 1)); else
    failed=$((failed + 1))
    sed 's/^/  /' "$output.test" | tail -20
  fi
done
rm -f "$output.test"
left=$((deadline - SECONDS))
measured=not
if [ $left -gt 30 ] && timeout "$left" "$bench" >>"$output"; then measured=all; fi
printf '{"passed": %d, "failed": %d, "not_run": %d, "measured": "%s"}\n' $passed $failed \
  $((${#names[@]} - passed - failed)) $measured | tee -a "$output"
[ $failed -eq 0 ]
