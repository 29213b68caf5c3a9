#!/usr/bin/env bash
# From a fresh clone on Debian 12 to a trained model: installs, builds, exports SmolLM2-135M, serves
# it with two ranks and runs examples/grpo.py against it. Arguments go to grpo.py (--steps 30 ..).
# A second run skips what is done and starts in seconds.
set -euo pipefail
cd "$(dirname "$0")/.."

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export ROLLPACK_SOCKET=run/rollpack.sock
python=${ROLLPACK_VENV:-.venv}/bin/python
log=out/server.log
server=
trainer=

# Also on Ctrl-C and on errors: a polite request first, then the server's whole process group.
stop_all() {
  [ -z "$trainer" ] || kill -TERM "$trainer" 2>/dev/null || true
  [ -n "$server" ] || return 0
  kill -TERM "$server" 2>/dev/null || true
  for _ in $(seq 50); do
    kill -0 "$server" 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL -- "-$server" 2>/dev/null || true
  wait "$server" 2>/dev/null || true
  server=
}
trap stop_all EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

tests/install.sh
tests/build.sh release --target rollpack
"$python" examples/export_smollm2.py

mkdir -p out run
set -m # the server gets a process group of its own
mpirun -n 2 --bind-to none --oversubscribe \
  build/rollout/rollpack serve --config configs/quickstart.yaml >"$log" 2>&1 </dev/null &
server=$!
set +m
echo "starting the server (log: $log)"
deadline=$((SECONDS + 180))
until grep -q '^ready' "$log"; do
  if ! kill -0 "$server" 2>/dev/null || [ $SECONDS -ge $deadline ]; then
    echo "quickstart.sh: the server did not get ready; its log:" >&2
    cat "$log" >&2
    exit 1
  fi
  sleep 0.1
done

# In the background: bash runs its traps while it waits, but not while a foreground program runs.
"$python" examples/grpo.py --socket "$ROLLPACK_SOCKET" "$@" &
trainer=$!
wait "$trainer"
trainer=
