#!/usr/bin/env bash
# Set up if needed, then regenerate every table and figure of one profile. See --help.
source "$(dirname "$0")/workflow/environment.sh"
exec "$PYTHON" "$ROOT/workflow/run_all.py" "$@"
