#!/usr/bin/env bash
# Set up if needed, then lint, unit tests, and every notebook through nbval.
#   ./run_tests.sh [lint|unit|notebooks ...]      all three without arguments
source "$(dirname "$0")/workflow/environment.sh"
cd "$ROOT"
parts=("$@")
[ $# -gt 0 ] || parts=(lint unit notebooks)

for part in "${parts[@]}"; do
  case $part in
    lint)
      "$PYTHON" -m ruff check .
      "$PYTHON" -m ruff format --check . ;;
    unit)
      "$PYTHON" -m pytest -q tests ;;
    notebooks)
      # One store for all of them, so that a teacher is trained once; gone afterwards. Chapters run
      # side by side, a core each: a network as small as smoke's gains nothing from a second one.
      scratch=$(mktemp -d)
      trap 'rm -rf "$scratch"' EXIT
      printf '%s\n' notebooks/rco notebooks/kr notebooks/search notebooks/stc notebooks/*.ipynb |
        KDLIB_HOME=$scratch/runs KDLIB_RESULTS=$scratch/results KDLIB_PROGRESS=quiet \
        OMP_NUM_THREADS=1 xargs -P "$(getconf _NPROCESSORS_ONLN)" -n 1 \
        "$PYTHON" -m pytest -q -p tests.nbval_sockets --nbval-lax --nbval-current-env \
        --nbval-cell-timeout=300 --nbval-kernel-startup-timeout=180 \
        --nbval-sanitize-with=tests/nbval_sanitize.cfg ;;
    *) die "unknown part '$part': lint, unit or notebooks" ;;
  esac
done
