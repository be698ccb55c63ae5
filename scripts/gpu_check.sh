#!/usr/bin/env bash
# Everything about the GPU in one command, under 8 minutes: whether the codec and training are right there, and how
# fast the codec is. Takes whatever Python, torch and Horovod are there, and installs nothing; the native codec is
# built in its folder, if that has not been done.
#
# Usage: gpu_check.sh [FOLDER]   what it finds goes there, too          (default: build/gpu_check)
#
# Environment:
#   PYTHON                       interpreter, with torch 2.5 or later     (default: .venv/bin/python, or python3)
#   HVD_QUANT_CHECK_DEVICE       cuda, or cpu to see that this runs       (default: cuda)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-$root/build/gpu_check}
device=${HVD_QUANT_CHECK_DEVICE:-cuda}
python=${PYTHON:-}
[ -n "$python" ] || { [ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python || python=python3; }
# The caller's folder is left below.
[[ $out == /* ]] || out=$PWD/$out
[[ $python != */* || $python == /* ]] || python=$PWD/$python
cd "$root"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
has() { "$python" -c "import $1" 2>/dev/null; }
says() { printf '\n== %s\n' "$*"; }

"$python" - "$device" <<'PYTHON'
import sys
try:
    import torch
except ImportError:
    sys.exit("gpu_check: this Python has no torch; name another one as PYTHON=...")
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("gpu_check: there is no GPU that torch can use")
card = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "no GPU"
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {card}")
PYTHON

mkdir -p "$out"
if ! has hvd_quant.codec._native; then
  says "Building the native codec, with which the GPU's is compared"
  "$python" setup.py -q build_ext --inplace
fi

kinds=() values=()
[ "$device" = cuda ] || kinds=(--kinds QSGD "error feedback, DQ-SGD") values=(--values 65536 --repeats 2)
status=0
says "The codec at both levels"
"$python" tests/ranks/gpu/check_codec.py --device "$device" 2>&1 | tee "$out/codec.txt" || status=1

says "The unit tests of the codec on a GPU"
if [ "$device" = cuda ] && has pytest && has hypothesis; then
  "$python" -m pytest -q -p no:cacheprovider tests/unit -k torch-cuda 2>&1 | tee "$out/unit.txt" || status=1
else
  echo "skipped: needs a GPU, pytest and hypothesis"
fi

says "Training on two ranks"
if has horovod.torch; then
  "$python" -m horovod.runner.launch -np 2 "$python" tests/ranks/gpu/check_ranks.py --device "$device" ${kinds[@]+"${kinds[@]}"} 2>&1 |
    tee "$out/ranks.txt" || status=1
else
  echo "skipped: needs Horovod with PyTorch"
fi

says "Speed"
"$python" -m benchmarks.codec_gpu --device "$device" --markdown --json "$out/speed.json" ${values[@]+"${values[@]}"} |
  tee "$out/speed.txt" || status=1

if [ $status = 0 ]; then says "All passed; $out has it all."; else says "SOMETHING FAILED, see above; $out has it all."; fi
exit $status
