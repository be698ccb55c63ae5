#!/usr/bin/env bash
# Runs those of Horovod's own tests that train with an optimizer, with our compressors in place of none.
#
#   git clone --depth 1 --branch v0.28.1 https://github.com/horovod/horovod ../horovod
#   scripts/horovod_suite.sh ../horovod
#
# Three times: as they are, with a compressor in Horovod's optimizer, and with one in ours; on two ranks, and for
# elastic training on as many as its tests start. The results are in build/horovod_suite; docs/works-with.md says
# what differs, and why.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tests=$(cd "$1/test" && pwd)
results=$root/build/horovod_suite
python=$root/.venv/bin/python
selection='optimizer or force_allreduce or model_parallelism or dynamic_requires_grad or gradient_clipping or
  broadcast_state or compression_fp16 or synchronize or timeline_api'

"$python" -m pip install -q mock parameterized
mkdir -p "$results"
export PATH=$root/.venv/bin:$PATH OMP_NUM_THREADS=1 HOROVOD_GLOO_TIMEOUT_SECONDS=10
export PYTHONPATH=$root/scripts/horovod_suite:$tests/utils:$tests/parallel:$tests/integration
for whose in none horovod ours; do
  export HVD_QUANT_SUITE=$whose
  echo "== $whose"
  cd "$tests/parallel"
  timeout 300 horovodrun -np 2 --gloo "$python" -m pytest -q -p no:cacheprovider test_torch.py -k "$(echo $selection)" \
    >"$results/$whose.parallel.txt" 2>&1 || true
  cd "$tests/single"
  timeout 120 "$python" -m pytest -q -p no:cacheprovider test_torch_elastic.py >"$results/$whose.state.txt" 2>&1 || true
  cd "$tests/integration"
  timeout 900 "$python" -m pytest -q -p no:cacheprovider --timeout 100 test_elastic_torch.py >"$results/$whose.elastic.txt" 2>&1 || true
  for part in parallel state elastic; do
    echo "$part: $(grep -E '[0-9]+ (passed|failed|skipped|error)' "$results/$whose.$part.txt" | tail -n 1)"
    grep -hoE '(FAILED|ERROR) [^ ]+' "$results/$whose.$part.txt" | sort -u | sed 's/^/  /' || true
  done
done
