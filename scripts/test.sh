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
if [ "${1:-}" = --quick ]; then
  shift
  set -- tests/unit tests/ranks/test_torch.py::test_a_first_job "$@"
fi
# What several ranks run, one job after the other (tests/conftest.py), beside the unit tests.
exec .venv/bin/python -m pytest -n 2 --dist loadgroup "$@"
