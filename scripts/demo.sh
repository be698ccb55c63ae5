#!/usr/bin/env bash
# Trains a CNN on Fashion-MNIST twice, on two ranks: with float32 gradients and with 4-bit QSGD gradients.
# Shows both side by side and plots them. Sets everything up first where that has not been done.
#
# Environment: EPOCHS (default 5), NP (ranks, default 2), BITS (default 4), OUTPUT (default build/demo)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
epochs=${EPOCHS:-5}
ranks=${NP:-2}
bits=${BITS:-4}
output=${OUTPUT:-$root/build/demo}

"$root/scripts/setup.sh"
mkdir -p "$output"

train() {
  local name=$1
  shift
  printf '\n== %s: horovodrun -np %s python examples/torch_fashion_mnist.py --epochs %s %s\n' \
    "$name" "$ranks" "$epochs" "$*"
  # Only rank 0 speaks: its lines read better without the launcher's marks, and without what TensorFlow says when
  # horovodrun imports it to see how Horovod was built.
  "$root/.venv/bin/horovodrun" -np "$ranks" "$root/.venv/bin/python" "$root/examples/torch_fashion_mnist.py" \
    --epochs "$epochs" --json-log "$output/$name.jsonl" "$@" 2>&1 |
    sed -u -E 's/^\[[0-9,]+\]<std(out|err)>://
      /^(WARNING: All log messages before absl|[IWE]0000 00:00:|To enable the following instructions)/d'
}

train fp32 --compression none
train "qsgd-${bits}bit" --compression qsgd --bits "$bits"
printf '\n'
"$root/.venv/bin/python" "$root/examples/compare_runs.py" --plot "$output/demo.png" \
  "$output/fp32.jsonl" "$output/qsgd-${bits}bit.jsonl"
