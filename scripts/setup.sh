#!/usr/bin/env bash
# From a fresh Debian or Ubuntu machine to a working .venv/ at the repository's root:
# system packages, torch and TensorFlow, Horovod built from source, hvd_quant.
# Safe to run again: what is done is skipped.
#
# Usage: setup.sh [--until PART]    stops after system, frameworks or horovod (for the layers of an image)
#
# Environment:
#   PYTHON                         interpreter for a new virtual environment         (default: python3)
#   HVD_QUANT_FRAMEWORKS           torch, tensorflow, or both with a space between   (default: both)
#   HVD_QUANT_TORCH_VERSION        torch release                                     (default: 2.13.0)
#   HVD_QUANT_TORCH_INDEX          where CPU builds of torch come from if pip's own indexes have none
#   HVD_QUANT_TENSORFLOW_VERSION   TensorFlow release, 2.16 or later                 (default: 2.21.0)
#   HVD_QUANT_GPU                  yes or no: set up for a GPU            (default: whether nvidia-smi lists one)
#   HOROVOD_*, MAKEFLAGS           passed on to Horovod's build
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

until=
case "$#:${1:-}:${2:-}" in
  0::) ;;
  2:--until:system | 2:--until:frameworks | 2:--until:horovod) until=$2 ;;
  *)
    echo "usage: setup.sh [--until system|frameworks|horovod]" >&2
    exit 2
    ;;
esac

python=${PYTHON:-python3}
read -ra frameworks <<<"${HVD_QUANT_FRAMEWORKS:-torch tensorflow}"
torch_version=${HVD_QUANT_TORCH_VERSION:-2.13.0}
tensorflow_version=${HVD_QUANT_TENSORFLOW_VERSION:-2.21.0}
torch_index=${HVD_QUANT_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
horovod_version=0.28.1
venv=$root/.venv
stamps=$venv/.hvd_quant
logs=$root/build/logs
mkdir -p "$logs"
unset PYTHONHOME PYTHONPATH # another environment's packages must not leak into ours

# One at a time: a second call waits for the first, and then finds everything done.
exec 9>"$root/build/setup.lock"
if command -v flock >/dev/null; then
  flock -n 9 || { echo "setup: waiting for another setup.sh to finish" && flock 9; }
fi

# --- reporting ------------------------------------------------------------------------------------------

say() { printf '%s\n' "$*"; }

fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

# hint LOG: what a failed step's log may mean.
hint() {
  case $(tail -n 100 "$1") in
    *"No space left"*) printf ' (the disk is full: make room at %s, or in TMPDIR)' "$root" ;;
    *"Disk quota"*) printf ' (a disk quota is used up, of %s or of TMPDIR)' "$root" ;;
    *"Network is unreachable"* | *"name resolution"* | *"Name or service not known"* | *"Could not resolve"* | \
      *"Temporary failure resolving"* | *"Connection refused"* | *"No route to host"* | *"timed out"*)
      printf ' (there seems to be no network: pip and apt-get must reach their indexes)' ;;
    *CERTIFICATE_VERIFY_FAILED*)
      printf ' (a proxy with a certificate of its own? Set PIP_CERT to a file with it)' ;;
    *"Killed signal"*) printf ' (the compiler ran out of memory: try MAKEFLAGS=-j1)' ;;
  esac
}

# step NAME COMMAND...: run the command with its output in NAME.log, showing that time passes.
step() {
  local name=$1 log=$logs/$1.log begin=$SECONDS pid status=0
  shift
  set -m # a process group of its own, to be ended as a whole
  "$@" >"$log" 2>&1 </dev/null 9>&- &
  pid=$!
  set +m
  trap 'kill -- -'"$pid"' 2>/dev/null || true' EXIT
  while kill -0 "$pid" 2>/dev/null; do
    if [ -t 1 ]; then
      printf '\r  %-18s %4ds  %s\033[K' "$name" $((SECONDS - begin)) "$(tail -n 1 "$log" | tr -d '\r' | cut -c1-60)"
      sleep 0.5
    else
      sleep 0.2
    fi
  done
  wait "$pid" || status=$?
  trap - EXIT
  [ -t 1 ] && printf '\r\033[K'
  if [ "$status" -ne 0 ]; then
    printf -- '--- last lines of %s\n' "$log" >&2
    tail -n 25 "$log" >&2
    fail "step '$name' failed (exit status $status); full log: $log$(hint "$log")"
  fi
  printf '  %-18s %4ds\n' "$name" $((SECONDS - begin))
}

# is_done NAME KEY: whether step NAME was last finished with this KEY.
is_done() { [ "$(cat "$stamps/$1" 2>/dev/null || true)" = "$2" ]; }

# once NAME KEY COMMAND...: a step that is skipped where it is done.
once() {
  local name=$1 key=$2
  shift 2
  if ! is_done "$name" "$key"; then
    rm -f "$stamps/$name"
    step "$name" "$@"
    printf '%s' "$key" >"$stamps/$name"
  fi
}

# has FRAMEWORK: whether it was asked for.
has() { [[ " ${frameworks[*]} " == *" $1 "* ]]; }

for framework in "${frameworks[@]}"; do
  [[ $framework =~ ^(torch|tensorflow)$ ]] ||
    fail "HVD_QUANT_FRAMEWORKS names '$framework'; it takes torch, tensorflow, or both with a space between"
done
[ ${#frameworks[@]} -gt 0 ] || fail "HVD_QUANT_FRAMEWORKS is empty; it takes torch, tensorflow, or both"

# --- system packages ------------------------------------------------------------------------------------

# What is needed is looked for itself, not by package name: it may have come from anywhere.
missing_packages() {
  command -v mpirun >/dev/null || echo openmpi-bin
  command -v ssh >/dev/null || echo openssh-client # Open MPI complains without one, on one host too
  all_done && return
  command -v g++ >/dev/null || echo g++
  command -v make >/dev/null || echo make
  command -v cmake >/dev/null || echo cmake
  # Debian has the compiler's wrapper without the headers, too.
  mpicxx -E -x c++ - <<<'#include <mpi.h>' >/dev/null 2>&1 || echo libopenmpi-dev
  if command -v "$python" >/dev/null; then
    "$python" -c 'import sys, sysconfig, os
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || echo python3-dev
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
  else
    printf '%s\n' python3 python3-dev python3-venv
  fi
}

as_root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

apt_install() {
  as_root apt-get update
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}

install_system_packages() {
  local missing
  mapfile -t missing < <(missing_packages)
  [ ${#missing[@]} -gt 0 ] || return 0
  say "missing system packages: ${missing[*]}"
  if ! command -v apt-get >/dev/null; then
    fail "this machine has no apt-get; install what these Debian packages hold, then run again: ${missing[*]}"
  fi
  if [ "$(id -u)" -ne 0 ] && ! { command -v sudo >/dev/null && sudo -v; }; then
    fail "not root, and no sudo. As root: apt-get install ${missing[*]}"
  fi
  step system-packages apt_install "${missing[@]}"
  mapfile -t missing < <(missing_packages)
  [ ${#missing[@]} -eq 0 ] || fail "still missing, though apt-get has installed it: ${missing[*]}"
}

# The data set is the examples' alone: nothing else needs it, and not every distribution has the package.
install_data_set() {
  local package=dataset-fashion-mnist
  [ -e /usr/share/datasets/fashion-mnist ] && return 0
  [ -e "$stamps/no-data-set" ] && return 0 # tried before
  if command -v apt-get >/dev/null && { [ "$(id -u)" -eq 0 ] || sudo -n true 2>/dev/null; }; then
    apt_install "$package" >"$logs/data-set.log" 2>&1 </dev/null 9>&- && return 0
  fi
  touch "$stamps/no-data-set"
  say "note: could not install the package $package, which the examples train on; they take --data-dir instead"
}

# --- Python packages ------------------------------------------------------------------------------------

# Not with grep -q: it leaves early, and pipefail takes the other side's broken pipe for a failure.
has_gpu() {
  case "${HVD_QUANT_GPU:-}" in
    yes) true ;;
    no) false ;;
    *) command -v nvidia-smi >/dev/null && [[ $(timeout 20 nvidia-smi -L 2>/dev/null) == *GPU* ]] ;;
  esac
}
has_nccl() { [ -n "${HOROVOD_NCCL_HOME:-}" ] || [[ $(PATH=$PATH:/sbin:/usr/sbin ldconfig -p) == *libnccl* ]]; }

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

make_venv() {
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed")'
  rm -rf "$venv"
  mkdir -p "$stamps" # by which it is known for ours
  "$python" -m venv "$venv"
  pip install 'setuptools<81' wheel packaging pybind11
}

install_torch() {
  if has_gpu || [ "$(uname -m)" != x86_64 ]; then
    # Not the CPU build, which a folder of wheels may hold, and which pip takes for the newer one.
    pip install "torch==$torch_version,!=${torch_version%%+*}+cpu" numpy
  else
    # The plain x86-64 package brings several GB of CUDA; the CPU build is a local version of the same.
    # Where neither pip's indexes nor torch's own have that, the package with CUDA works as well.
    pip install "torch==$torch_version+cpu" numpy ||
      pip install "torch==$torch_version+cpu" numpy --extra-index-url "$torch_index" ||
      pip install "torch==$torch_version" numpy
  fi
}

install_tensorflow() {
  local package=tensorflow
  if has_gpu; then package='tensorflow[and-cuda]'; fi
  # tf-keras is the Keras before Keras 3, which Horovod's own Keras optimizer is for.
  pip install "$package==$tensorflow_version" "tf-keras==${tensorflow_version%.*}.*"
}

# Whether the system's CMake is new enough for Horovod and what it brings along.
cmake_is_new() {
  local version
  version=$(cmake --version 2>/dev/null | sed -n '1s/.* //p')
  [ "$(printf '3.18\n%s\n' "${version:-0}" | sort -V | head -n 1)" = 3.18 ]
}

build_horovod() {
  # Not below $root: its path may hold spaces, which Horovod's build does not take. Nor does it take them in the
  # environment's, since it hands on TensorFlow's folders unquoted.
  local work source environment=$venv
  work=$(mktemp -d)
  if [[ $work =~ [[:space:]] ]]; then work=$(TMPDIR=/tmp mktemp -d); fi
  if [[ $venv =~ [[:space:]] ]]; then environment=$work/venv && ln -s "$venv" "$environment"; fi
  source=$work/horovod-$horovod_version
  # Expanded now, because the local variable is gone by then.
  # shellcheck disable=SC2064
  trap "rm -rf $(printf %q "$work")" EXIT
  pip download --no-deps --no-binary :all: --no-build-isolation -d "$work" "horovod==$horovod_version"
  tar -xzf "$source.tar.gz" -C "$work"
  "$venv/bin/python" scripts/patch_horovod.py "$source"
  if has_gpu && command -v nvcc >/dev/null && has_nccl; then
    export HOROVOD_GPU_OPERATIONS=${HOROVOD_GPU_OPERATIONS:-NCCL}
  fi
  pip install cloudpickle psutil pyyaml cffi
  if ! cmake_is_new; then pip install 'cmake>=3.18,<4'; fi
  # CMake 4 refuses the third-party projects' old minimum versions unless told otherwise.
  (
    export PATH="$environment/bin:$PATH" CMAKE_POLICY_VERSION_MINIMUM=3.5
    export HOROVOD_WITHOUT_MXNET=1
    if has torch; then export HOROVOD_WITH_PYTORCH=1; else export HOROVOD_WITHOUT_PYTORCH=1; fi
    if has tensorflow; then export HOROVOD_WITH_TENSORFLOW=1; else export HOROVOD_WITHOUT_TENSORFLOW=1; fi
    export HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 MAKEFLAGS=${MAKEFLAGS:--j$(nproc)}
    cd "$source"
    "$environment/bin/python" -m pip wheel --no-deps --no-build-isolation -w "$work/wheels" .
  )
  pip install --force-reinstall --no-deps "$work/wheels/horovod-$horovod_version"*.whl
}

install_hvd_quant() {
  HVD_QUANT_WERROR=1 pip install --no-build-isolation --editable '.[cli,mpi,plot,test]'
}

# --- the steps ------------------------------------------------------------------------------------------

# reached PART: whether to stop here.
reached() {
  [ "$until" = "$1" ] || return 1
  say "stopped after $1, as asked"
}

# What is built takes about 4 GB with both frameworks' CPU builds, and pip needs room to unpack beside that.
check_space() {
  local free
  free=$(df -Pk "$root" 2>/dev/null | awk 'NR == 2 { print int($4 / 1024 / 1024) }') || return 0
  [ "${free:-$gigabytes}" -ge "$gigabytes" ] ||
    fail "$root has $free GB free, and setting up takes about $gigabytes GB. Make room, or clone to another disk"
}

kind=$(has_gpu && echo gpu || echo cpu)
gigabytes=$([ "$kind" = gpu ] && echo 20 || echo 6)
torch_key="$torch_version $kind"
tensorflow_key="$tensorflow_version $kind"
built_for=
if has torch; then built_for+=" torch-$torch_version-$kind"; fi
if has tensorflow; then built_for+=" tensorflow-$tensorflow_version-$kind"; fi
horovod_key="$horovod_version$built_for $(cksum <scripts/patch_horovod.py)"

frameworks_done() {
  is_done venv "$venv" && { ! has torch || is_done torch "$torch_key"; } &&
    { ! has tensorflow || is_done tensorflow "$tensorflow_key"; }
}

# Whether nothing is left to build, so that no compiler is needed.
all_done() {
  frameworks_done && is_done horovod "$horovod_key" && is_done hvd_quant "$(hvd_quant_key)"
}

hvd_quant_key() { cat setup.py pyproject.toml hvd_quant/codec/csrc/{,*/}*.[ch]pp | cksum; }

# A .venv whose interpreter has gone, or that was moved here from elsewhere, is made again.
if [ -d "$stamps" ] && ! "$venv/bin/python" -c '' 2>/dev/null; then rm -f "${stamps:?}"/*; fi
compgen -G 'hvd_quant/codec/_native*.so' >/dev/null || rm -f "$stamps/hvd_quant"

if [ -n "${PYTHON:-}" ] && ! command -v "$python" >/dev/null; then
  fail "PYTHON names $python, and there is no such program"
fi
if [ -e "$venv" ] && [ ! -d "$stamps" ]; then
  fail "$venv is there already, and not of this script's making: move it away"
fi

say "hvd_quant: setting up $venv (logs in $logs)"
# What comes later than the frameworks takes little.
frameworks_done || check_space
install_system_packages
reached system && exit
once venv "$venv" make_venv
install_data_set
if has torch; then once torch "$torch_key" install_torch; fi
if has tensorflow; then once tensorflow "$tensorflow_key" install_tensorflow; fi
reached frameworks && exit
once horovod "$horovod_key" build_horovod
reached horovod && exit
once hvd_quant "$(hvd_quant_key)" install_hvd_quant

# TensorFlow says much when it is imported.
"$venv/bin/python" - "${frameworks[@]}" 2>"$logs/ready.log" <<'PYTHON' || { cat "$logs/ready.log" >&2 && exit 1; }
import importlib
import platform
import sys

versions = []
for name in sys.argv[1:]:
    versions.append(f"{name} {importlib.import_module(name).__version__}")
    hvd = importlib.import_module(f"horovod.{name}")

import horovod  # after the frameworks
import hvd_quant

controllers = ", ".join(name for name, built in (("MPI", hvd.mpi_built()), ("Gloo", hvd.gloo_built())) if built)
gpu = "NCCL" if hvd.nccl_built() else "none"
print(f"ready: Python {platform.python_version()}, {', '.join(versions)}, ", end="")
print(f"Horovod {horovod.__version__} (controllers: {controllers}; GPU operations: {gpu}), ", end="")
print(f"hvd_quant {hvd_quant.__version__} (codec: {hvd_quant.native_isa()})")
PYTHON
