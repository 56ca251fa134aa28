#!/usr/bin/env bash
# Create the Python environment if needed, then run the linter, the unit tests and all notebooks.
#   ./run_tests.sh [lint|unit|notebooks ...]      all three parts if none is given
# $KDLIB_TEST_STORE: a store for the notebooks, such as that of run_all.sh. What it has trained is not
# trained again. By default the store is new and empty, and removed in the end.
for part in "$@"; do  # refused before anything is installed
  case $part in
    lint | unit | notebooks) ;;
    *) echo "Unknown part '$part'. Use lint, unit or notebooks." >&2; exit 2 ;;
  esac
done
source "$(dirname "$0")/workflow/environment.sh"
cd "$ROOT"
parts=("$@")
cores=$(getconf _NPROCESSORS_ONLN)
[ $# -gt 0 ] || parts=(lint unit notebooks)

for part in "${parts[@]}"; do
  case $part in
    lint)
      "$PYTHON" -m ruff check .
      "$PYTHON" -m ruff format --check . ;;
    unit)
      # A line for each process; every process has one thread. The last line takes all other tests.
      OMP_NUM_THREADS=1 xargs -P "$cores" -L 1 "$PYTHON" -m pytest -q <<'TESTS'
tests/kdbook/cli
tests/kdlib/engine
tests/kdlib/methods
tests/kdbook --ignore=tests/kdbook/cli
tests --ignore=tests/kdbook --ignore=tests/kdlib/engine --ignore=tests/kdlib/methods
TESTS
      ;;
    notebooks)
      # All notebooks share one temporary store, so that each teacher is trained once. The chapters
      # run in parallel with one core each: the small networks of smoke do not profit from a second.
      scratch=$(mktemp -d)
      trap 'rm -rf "$scratch"' EXIT
      printf '%s\n' notebooks/rco notebooks/kr notebooks/search notebooks/stc notebooks/*.ipynb |
        KDLIB_HOME=${KDLIB_TEST_STORE:-$scratch/runs} KDLIB_RESULTS=$scratch/results KDLIB_PROGRESS=quiet \
        OMP_NUM_THREADS=1 xargs -P "$cores" -n 1 \
        "$PYTHON" -m pytest -q -p tests.nbval_sockets --nbval-lax --nbval-current-env \
        --nbval-cell-timeout=900 --nbval-kernel-startup-timeout=180 \
        --nbval-sanitize-with=tests/nbval_sanitize.cfg ;;
  esac
done
