#!/usr/bin/env bash
# Sets itself up on a fresh machine and checks the project: ruff, the arrows between rooms, the tests.
#   bash launch/test.sh            all but the slow tests
#   bash launch/test.sh --slow     all tests
#   bash launch/test.sh ARG...     other arguments go to pytest, such as tests/data or -k packing
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup_env.sh

arguments=()
for argument in "$@"; do
    if [ "$argument" = --slow ]; then arguments+=(-m ""); else arguments+=("$argument"); fi
done

setup_env test
"$PYTHON" -m ruff check --quiet .
arrows=$("$(dirname "$PYTHON")/lint-imports" --no-logo 2>&1) || { echo "$arrows" >&2; exit 1; }
# A file of tests is one process's, and so are what its tests share and the programs they compile.
"$PYTHON" -m pytest --quiet --numprocesses=auto --maxprocesses=8 --dist=loadfile ${arguments[@]+"${arguments[@]}"}
echo "all checks pass after $SECONDS s"
