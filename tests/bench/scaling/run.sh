#!/usr/bin/env bash
# How cost grows with rows, context length, threads and ranks: tests/bench/scaling/run.sh [MODEL]
# MODEL, for the runs with ranks: a folder, by default the random Qwen2.5-0.5B that ../peers.sh also
# uses. Takes about five minutes. Exit status 1: a token costs more among many than among few, or
# context costs more than attention.
set -euo pipefail
cd "$(dirname "$0")/../../.."
python=${ROLLPACK_VENV:-$PWD/.venv}/bin/python
model=${1:-${ROLLPACK_PEERS_DIR:-$PWD/build/peers}/models/qwen2.5-0.5b}
tests/build.sh release --target bench_scaling --target rollpack >&2
if [ ! -e "$model/config.json" ]; then
  mkdir -p "$(dirname "$model")"
  "$python" tests/bench/peers/make_model.py qwen2.5-0.5b "$model" >&2
fi
status=0
build/tests/bench/bench_scaling || status=$?
"$python" tests/bench/scaling/ranks.py build/rollout/rollpack "$model"
exit $status
