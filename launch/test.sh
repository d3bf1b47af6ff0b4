#!/usr/bin/env bash
# Sets itself up on a new machine and checks the project: ruff, the import contracts, the tests.
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
contracts=$("$(dirname "$PYTHON")/lint-imports" --no-logo 2>&1) || { echo "$contracts" >&2; exit 1; }
# All tests of a file run in one process, which shares their fixtures and compiled programs.
"$PYTHON" -m pytest --quiet --numprocesses=auto --maxprocesses=8 --dist=loadfile ${arguments[@]+"${arguments[@]}"}
echo "all checks pass after $SECONDS s"
