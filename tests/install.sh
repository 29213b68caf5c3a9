#!/usr/bin/env bash
# Installs what tests/packages/ lists: Debian packages (as root or with sudo), and a Python
# environment in .venv (ROLLPACK_VENV names another) with the client in it. What is there already
# is skipped, so a second run takes well under a second.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${ROLLPACK_VENV:-.venv}
lists=tests/packages

fail() {
  echo "install.sh: $*" >&2
  exit 1
}

# The lines of a list without comments.
packages_in() {
  sed -e 's/#.*//' -e 's/[[:space:]]//g' -e '/^$/d' "$1"
}

missing_debian_packages() {
  local installed
  installed=$(dpkg-query -W -f '${db:Status-Abbrev}${Package}\n' 2>/dev/null |
              sed -n 's/^ii //p' | sort -u)
  packages_in $lists/apt.txt | sort | comm -23 - <(echo "$installed")
}

install_debian_packages() {
  local missing as_root=()
  command -v dpkg-query >/dev/null ||
    fail "this is not Debian; install the equivalents of $lists/apt.txt and set ROLLPACK_NO_APT=1"
  missing=$(missing_debian_packages)
  [ -n "$missing" ] || return 0
  echo "install.sh: installing" $missing
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || fail "neither root nor sudo; ask for these packages:" $missing
    as_root=(sudo)
  fi
  "${as_root[@]}" apt-get update -qq || echo "install.sh: apt-get update failed; going on" >&2
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
    --no-install-recommends $missing >/dev/null || true
  missing=$(missing_debian_packages)
  [ -z "$missing" ] || fail "apt-get could not install:" $missing
}

# Names of pip.txt and pip_no_deps.txt that the environment lacks.
missing_python_packages() {
  packages_in <(cat $lists/pip.txt $lists/pip_no_deps.txt) | sed 's/[<>=~!;[].*//' |
    "$venv/bin/python" -c '
import importlib.metadata, sys
for name in sys.stdin.read().split():
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        print(name)'
}

free_space() {
  df -h --output=avail "$venv" | sed -n 's/ *\(.*\)/\1 free on its disk/; 2p'
}

pip_install() {
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

# Does $2 unless the stamp $1 says that it was done for the same input (the files that follow).
once_for() {
  local stamp=$venv/.rollpack-$1 action=$2 sum
  shift 2
  sum=$(cat "$@" | sha256sum)
  [ "$(cat "$stamp" 2>/dev/null)" != "$sum" ] || return 0
  $action
  echo "$sum" >"$stamp"
}

# Where no GPU is, torch without its CUDA packages: 1 GB instead of 5. Should a later torch not load
# that way, the packages that it asks for are installed after all.
install_torch() {
  local torch site_packages
  torch=$(packages_in $lists/pip.txt | grep '^torch[<>=~!]')
  site_packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  if ! compgen -G "/dev/nvidia[0-9]*" >/dev/null; then
    pip_install --no-deps "$torch" && python3 $lists/cpu_torch.py "$site_packages" &&
      pip_install "$torch" numpy && "$venv/bin/python" -c 'import torch' && return
    echo "install.sh: torch does not load without its CUDA packages; installing those (4 GB)" >&2
  fi
  python3 $lists/cpu_torch.py "$site_packages" --undo
  pip_install --force-reinstall "$torch"
}

install_python_packages() {
  echo "install.sh: installing Python packages into $venv (torch takes a minute and about 2 GB)"
  local done=1
  install_torch && pip_install -r $lists/pip.txt &&
    pip_install --no-deps -r $lists/pip_no_deps.txt || done=0
  local missing
  missing=$(missing_python_packages)
  [ -z "$missing" ] || fail "pip could not install: $missing ($(free_space))"
  [ $done = 1 ] || fail "pip failed; see its message above ($(free_space))"
}

# From a copy: pip builds inside the folder that it is given, and would leave its files there.
install_client() {
  local copy
  copy=$(mktemp -d)
  cp -r trainer_bridge/python/. "$copy"
  rm -rf "$copy/build"
  local done=1
  pip_install --force-reinstall --no-deps "$copy" && pip_install "$copy" || done=0
  rm -rf "$copy"
  [ $done = 1 ] || fail "pip could not install trainer_bridge/python; see its message above"
}

[ -n "${ROLLPACK_NO_APT:-}" ] || install_debian_packages
python=/usr/bin/python3
[ -x $python ] || python=python3
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || fail "python3 -m venv $venv failed"
once_for packages install_python_packages $lists/pip.txt $lists/pip_no_deps.txt $lists/cpu_torch.py
once_for client install_client trainer_bridge/python/pyproject.toml \
  trainer_bridge/python/rollpack/*.py
