#!/usr/bin/env bash
# Runs all tests: lint, unit tests, and the multi-rank tests under both of Horovod's controllers.
#
#   scripts/test.sh            # everything
#   scripts/test.sh --quick    # lint, the unit tests, and one job under each controller
#   scripts/test.sh tests/unit -k wire
#
# Sets everything up first where that has not been done. Other arguments are handed to pytest.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh"
cd "$root"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
pytest() { .venv/bin/python -m pytest "$@"; }

first_job=tests/ranks/test_torch.py::test_a_first_job
jobs=(tests/ranks tests/hosts tests/test_benchmarks.py --deselect "$first_job")
if [ "${1:-}" = --quick ]; then
  shift
  jobs=("$first_job")
elif [ $# -gt 0 ]; then
  pytest "$@"
  exit
fi
# Unit tests two at a time; jobs of several ranks one after the other: two take all cores already.
status=0
pytest -n 2 tests/unit "$@" || status=$?
pytest -v "${jobs[@]}" "$@" || status=$?
exit "$status"
