#!/usr/bin/env bash
# Run the unit tests with the lowest versions of torch and torchvision that pyproject.toml allows.
# They have an environment of their own: the folder lowest/ in the usual one.
#
#   tests/lowest.sh
source "$(dirname "$0")/../workflow/environment.sh"
cd "$ROOT"
venv=$(dirname "$(dirname "$PYTHON")")/lowest
[ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv"
{
  sed -nE 's/^ *"(torch|torchvision)>=([0-9.]+)",$/\1==\2/p' pyproject.toml
  grep -vE '^(torch|torchvision)==' constraints.txt
} > "$venv/constraints.txt"
echo "Installing the lowest versions into $venv …"
pip_install "$venv" -c "$venv/constraints.txt" -e '.[test]'
PATH="$venv/bin:$PATH" "$venv/bin/python" -m pytest -q tests
