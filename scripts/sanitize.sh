#!/usr/bin/env bash
# Builds the native codec with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the sources under
# build/sanitize, and runs the codec's unit tests on it. Fails if a test does, or if a sanitizer reports anything.
# The ordinary build in the working tree is neither used nor touched. Needs GCC and the .venv of setup.sh.
#
# Usage: scripts/sanitize.sh [pytest arguments]
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
scratch=$root/build/sanitize

rm -rf "$scratch"
mkdir -p "$scratch"
cp -R "$root"/{hvd_quant,tests,docs,setup.py,pyproject.toml} "$scratch"
find "$scratch" -name '*.so' -delete
cd "$scratch" # so that the copy is what Python imports
unset PYTHONHOME PYTHONPATH

echo 'sanitize: building, about a minute'
# Python's own flags have -fwrapv, which would hide overflows of signed integers.
export CFLAGS=-fno-wrapv CXXFLAGS=-fno-wrapv HVD_QUANT_SANITIZE=address,undefined
if ! "$python" setup.py build_ext --inplace >build.log 2>&1; then
  tail -n 25 build.log >&2
  exit 1
fi

# Python itself knows no sanitizer, so the run-time libraries come first by LD_PRELOAD; libstdc++ too, because
# libasan looks at start-up for the function that throws exceptions. torch, where a test imports it, is not
# instrumented, but works. A report ends the process, on the stderr that pytest is told to leave alone.
libraries=
for library in libasan.so libubsan.so libstdc++.so.6; do
  libraries+=${libraries:+:}$(realpath "$(gcc -print-file-name=$library)")
done
sanitized() {
  LD_PRELOAD=$libraries PYTHONMALLOC=malloc UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1 \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:abort_on_error=1 "$@"
}

sanitized "$python" - "$scratch/" <<'PYTHON'
import sys
from hvd_quant.codec import _native
if not _native.__file__.startswith(sys.argv[1]):
    sys.exit(f"sanitize: Python loads {_native.__file__} instead of the sanitized module")
PYTHON
sanitized "$python" -m pytest --capture=sys -p no:cacheprovider tests/unit/test_wire.py \
  tests/unit/codec/test_{codec,correlated,error_feedback,entropy,damage,message,out}.py \
  tests/unit/exchange/test_algorithms.py "$@"
