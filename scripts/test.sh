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
jobs=(-n 2 --maxschedchunk 1 tests/ranks --deselect "$first_job")
alone=(tests/hosts tests/test_benchmarks.py)
if [ "${1:-}" = --quick ]; then
  shift
  jobs=("$first_job") alone=()
elif [ $# -gt 0 ]; then
  pytest "$@"
  exit
fi
# Two at a time, but for hosts, which share the network's names, and benchmarks.
status=0
pytest -n 2 tests/unit "$@" || status=$?
pytest -v "${jobs[@]}" "$@" || status=$?
[ ${#alone[@]} -eq 0 ] || pytest -v "${alone[@]}" "$@" || status=$?
exit "$status"
