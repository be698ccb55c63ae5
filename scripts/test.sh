#!/usr/bin/env bash
# Runs all tests: lint, unit tests, and the multi-rank tests under both of Horovod's controllers.
# Sets everything up first where that has not been done. Arguments are handed to pytest.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh"
cd "$root"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest "$@"
