#!/usr/bin/env bash
# Create the Python environment if needed, then run the notebooks of one profile. See --help.
source "$(dirname "$0")/workflow/environment.sh"
# -P: import this checkout, also if the current folder is another one.
exec "$PYTHON" -P -m kdbook.cli.run_all "$@"
