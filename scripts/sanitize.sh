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
mkdir -p "$scratch/reports"
cp -R "$root"/{hvd_quant,tests,setup.py,pyproject.toml} "$scratch"
find "$scratch" -name '*.so' -delete
cd "$scratch" # so that the copy is what Python imports
unset PYTHONHOME PYTHONPATH

tests=()
for name in wire codec damage; do
  [ ! -e "tests/unit/test_$name.py" ] || tests+=("tests/unit/test_$name.py")
done
[ "${#tests[@]}" -gt 0 ] || { echo 'sanitize: no tests in tests/unit' >&2 && exit 1; }

echo 'sanitize: building (some minutes)'
if ! HVD_QUANT_SANITIZE=address,undefined "$python" setup.py build_ext --inplace >build.log 2>&1; then
  tail -n 25 build.log >&2
  exit 1
fi

# Python itself knows no sanitizer, so the run-time libraries come first by LD_PRELOAD; libstdc++ too, because
# libasan looks at start-up for the function that throws exceptions. Reports go to files: pytest would swallow them.
libraries=
for library in libasan.so libubsan.so libstdc++.so.6; do
  libraries+=${libraries:+:}$(realpath "$(gcc -print-file-name=$library)")
done
sanitized() {
  LD_PRELOAD=$libraries PYTHONMALLOC=malloc \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:log_path=$scratch/reports/asan \
    UBSAN_OPTIONS=print_stacktrace=1:log_path=$scratch/reports/ubsan "$@"
}

status=0
sanitized "$python" -c '
import sys
from hvd_quant.codec import _native
sys.exit(not _native.__file__.startswith(sys.argv[1]))' "$scratch/" || {
  echo 'sanitize: the sanitized module is not the one that Python loads' >&2
  status=1
}
[ "$status" -ne 0 ] || sanitized "$python" -m pytest -p no:cacheprovider "${tests[@]}" "$@" || status=$?

for report in reports/*; do
  [ -e "$report" ] || continue
  cat "$report" >&2
  status=1
done
[ "$status" -ne 0 ] && echo "sanitize: FAILED" >&2 || echo "sanitize: no reports"
exit "$status"
