# run_all.sh and run_tests.sh source this file. It finds or creates the Python environment and sets
# $PYTHON. The first of these environments is used:
#
# 1. $KDLIB_VENV, if set; it is created if it does not exist.
# 2. The environment of the Python that is on PATH (an active venv or conda environment, or any
#    other), if it satisfies pyproject.toml.
# 3. .venv in this checkout; it is created if it does not exist.

set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

# Notebooks run in other folders, so relative paths are made absolute here.
for variable in KDLIB_HOME KDLIB_RESULTS KDLIB_DATA KDLIB_VENV; do
  case ${!variable:-} in
    '' | /*) ;;
    *) export "$variable=$PWD/${!variable}" ;;
  esac
done

die() { printf '%s\n' "$*" >&2; exit 1; }

find_python() {
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
    if command -v "$name" >/dev/null &&
       "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"; return
    fi
  done
  die "No Python 3.11 or newer is on PATH. Install one, or add its folder to PATH."
}

pip_install() {  # pip_install DIRECTORY ARGUMENTS...; pip's cache makes a second try short
  local venv=$1 try
  shift
  for try in 1 2 3; do
    (cd "$ROOT" && "$venv/bin/python" -m pip install "$@") > "$venv/install.log" 2>&1 && return
    echo "pip failed (try $try of 3)." >&2
    sleep $((try * 5))
  done
  tail -n 25 "$venv/install.log" >&2
  die "The installation failed: see the messages above, or all of them in $venv/install.log." \
    "Correct the cause, then call this script again."
}

make_environment() {  # make_environment DIRECTORY
  local venv=$1 python=$1/bin/python wanted
  [ -x "$python" ] || "$(find_python)" -m venv "$venv"
  wanted=$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum)
  if [ "$(cat "$venv/kdlib-requirements" 2>/dev/null)" != "$wanted" ]; then
    [ -z "${FOUND:-}" ] || echo "$FOUND lacks: ${LACKS:-Python 3.11 or newer}."
    echo "Installing the packages into $venv (only once; torch and its libraries take minutes) …"
    pip_install "$venv" -c constraints.txt -e '.[test]'
    printf '%s\n' "$wanted" > "$venv/kdlib-requirements"
  elif ! PYTHONPATH='' "$python" "$REQUIREMENTS_MET" --installed-here; then
    pip_install "$venv" --no-deps -e .
  fi
  PYTHON=$python
}

REQUIREMENTS_MET=$ROOT/kdbook/cli/requirements_met.py
if [ -n "${KDLIB_VENV:-}" ]; then
  make_environment "$KDLIB_VENV"
elif FOUND=$(command -v python || command -v python3) &&
     LACKS=$("$FOUND" "$REQUIREMENTS_MET" 2>/dev/null); then
  PYTHON=$FOUND
else
  make_environment "$ROOT/.venv"
fi
export PYTHON
PATH="$(dirname "$PYTHON"):$PATH"
