"""Rules about one machine, judged from its facts alone.

Every rule is a function from facts to findings. A fact that could not be gathered is absent, or an error:
only the rule that checks for that error reports it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from hvd_quant.cli.facts import Facts

LEVELS = ("error", "warning", "note")
FRAMEWORKS = ("torch", "tensorflow")
SMALL_SHM = 256 << 20
SETUP = "run scripts/setup.sh of hvd_quant's repository, which builds it"


@dataclass(frozen=True)
class Finding:
    """Something that is odd.

    Args:
        level: "error" if something will not work, "warning" if it will be wrong or slow, "note" if it is
            worth knowing.
        name: name of the kind of finding.
        what: what is odd.
        why: why it matters.
        do: what to do about it.
        where: host that it is about; empty for all.
    """

    level: str
    name: str
    what: str
    why: str
    do: str
    where: str = ""


def examine(facts: Facts, ranks_here: int = 1) -> list[Finding]:
    """Return all findings about a machine, the worst first.

    Args:
        facts: as `hvd_quant.cli.facts.gather` returns them.
        ranks_here: number of the job's ranks on this machine.
    """
    found = run_all((rule, (facts, ranks_here)) for rule in RULES)
    return ordered(dict.fromkeys(found))  # shared by both frameworks: report once


def run_all(calls: Iterable[tuple[Callable[..., Iterable[Finding]], tuple[Any, ...]]]) -> Iterator[Finding]:
    """Run rules, each with its arguments. A rule that fails is a finding itself."""
    for rule, arguments in calls:
        try:
            yield from list(rule(*arguments))
        except Exception as error:  # noqa: PERF203
            what = f"the rule {rule.__name__} ended with {type(error).__name__}: {error}"
            yield Finding(
                "note", "doctor", what, "It could not judge what it looked at.", "Report this, please."
            )


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Sort findings by level."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


# --- the installation -------------------------------------------------------------------------------------


def codec_works(facts: Facts, _: int) -> Iterator[Finding]:
    error = facts["codec"].get("error")
    if error and "HVD_QUANT_ISA" in error:
        yield Finding(
            "error",
            "codec",
            f"hvd_quant's native codec refuses to work: {error}",
            "Nothing can be quantized.",
            "Unset HVD_QUANT_ISA, or set it to one that this machine has.",
        )
    elif error:
        yield Finding(
            "error",
            "codec",
            f"hvd_quant's native codec does not work: {error}",
            "Nothing can be quantized on this CPU.",
            "Install hvd_quant anew with this Python (pip install --force-reinstall), on this machine.",
        )
    elif facts["codec"].get("isa") == "portable" and "x86_64" in str(facts["host"].get("system")):
        yield Finding(
            "note",
            "codec-portable",
            "The native codec runs without AVX2.",
            "This CPU has none, or HVD_QUANT_ISA says so; the codec is several times slower.",
            "Unset HVD_QUANT_ISA, if it is set.",
        )


def frameworks_import(facts: Facts, _: int) -> Iterator[Finding]:
    for name in FRAMEWORKS:
        if facts[name].get("installed") and "error" in facts[name]:
            yield Finding(
                "error",
                f"{name}-broken",
                f"{name} is installed, and cannot be imported: {facts[name]['error']}",
                "Neither Horovod nor hvd_quant can use it.",
                f"Install {name} anew, with this Python.",
            )
    if not any(facts[name].get("installed") for name in FRAMEWORKS) and not facts["packages"].get("mpi4py"):
        yield Finding(
            "warning",
            "no-framework",
            "None of torch, TensorFlow and mpi4py is installed for this Python.",
            "hvd_quant exchanges gradients for one of them.",
            SETUP.replace("builds it", "installs them"),
        )


def horovod_is_built(facts: Facts, _: int) -> Iterator[Finding]:
    present = [name for name in FRAMEWORKS if facts[name].get("version")]
    if not facts["packages"].get("horovod") and not any(_built(facts, name) for name in present):
        if present:
            yield Finding(
                "error",
                "no-horovod",
                "Horovod is not installed for this Python.",
                "hvd_quant.torch and hvd_quant.tensorflow are front ends for it. (hvd_quant.mpi needs none.)",
                SETUP,
            )
        return
    for name in present:
        horovod = facts[name].get("horovod", {})
        if not horovod.get("built"):
            yield Finding(
                "error",
                f"horovod-without-{name}",
                f"{name} is installed, but Horovod was built without it, or for another release: "
                f"{horovod.get('error')}",
                f"horovod.{name} does not work, and with it hvd_quant.{name}.",
                SETUP + "; pip's own build leaves out a framework that it cannot compile against",
            )


def controllers(facts: Facts, _: int) -> Iterator[Finding]:
    for name in FRAMEWORKS:
        if not _built(facts, name):
            continue
        horovod = facts[name]["horovod"]
        if not horovod["mpi"] and not horovod["gloo"]:
            yield Finding(
                "error",
                "no-controller",
                f"Horovod for {name} has neither MPI nor Gloo.",
                "Ranks cannot meet.",
                "Build it with HOROVOD_WITH_MPI=1 or HOROVOD_WITH_GLOO=1: " + SETUP,
            )
        elif not horovod["mpi"]:
            yield Finding(
                "note",
                "no-mpi",
                f"Horovod for {name} was built without MPI.",
                "horovodrun takes Gloo, and mpirun cannot start its ranks.",
                "If you want MPI, build with HOROVOD_WITH_MPI=1: " + SETUP,
            )
        elif "error" in facts["mpi"] and facts["mpi"].get("launcher"):
            yield Finding(
                "warning" if horovod["gloo"] else "error",
                "mpirun-broken",
                f"mpirun does not print its version: {facts['mpi']['error']}.",
                "horovodrun starts ranks with mpirun, unless it is given --gloo.",
                "Repair or reinstall Open MPI (Debian: openmpi-bin), or use horovodrun --gloo.",
            )
        elif "error" not in facts["mpi"] and facts["mpi"].get("launcher") is None:
            yield Finding(
                "warning" if horovod["gloo"] else "error",
                "no-mpirun",
                "Horovod was built with MPI, and there is no mpirun in PATH.",
                "horovodrun starts ranks with mpirun, unless it is given --gloo.",
                "Put mpirun into PATH (Debian: apt-get install openmpi-bin), or use horovodrun --gloo.",
            )


def keras(facts: Facts, _: int) -> Iterator[Finding]:
    version = str(facts["tensorflow"].get("keras") or "")
    if version.startswith("3.") and _built(facts, "tensorflow"):
        yield Finding(
            "note",
            "keras-3",
            f"model.fit uses Keras {version}.",
            "Horovod's own Keras optimizer reduces nothing there, and says nothing: replicas drift apart.",
            "Use hvd_quant.tensorflow.keras.DistributedOptimizer, which does; or TF_USE_LEGACY_KERAS=1 and "
            "tf_keras with Horovod's.",
        )


# --- GPUs -------------------------------------------------------------------------------------------------


def gpus_are_used(facts: Facts, _: int) -> Iterator[Finding]:
    present = bool(facts["gpus"].get("names"))
    if error := facts["gpus"].get("error"):
        yield Finding(
            "warning",
            "gpu-driver",
            f"nvidia-smi is there, and fails: {error}",
            "If this machine has a GPU, nothing can use it.",
            "Repair NVIDIA's driver; in a container, start it with --gpus all.",
        )
    cuda = facts["torch"].get("cuda")
    if cuda and not present and "version" in facts["torch"]:
        yield Finding(
            "note",
            "torch-cuda-on-cpu",
            f"torch is built for CUDA {cuda}, and there is no GPU here.",
            "It works, on the CPU; its CUDA libraries take several GB that nothing uses.",
            "Take torch's CPU build, as scripts/setup.sh does on such a machine.",
        )
    if not present:
        return
    if "version" in facts["torch"] and not facts["torch"].get("gpus"):
        yield Finding(
            "warning",
            "gpu-unused",
            "There is a GPU, and torch does not see it"
            + (" (torch is its CPU build)." if not cuda else f" (torch is built for CUDA {cuda})."),
            "Training runs on the CPU.",
            "Install a torch that is built for this driver's CUDA, or unset CUDA_VISIBLE_DEVICES.",
        )
    for name in FRAMEWORKS:
        if _built(facts, name) and facts[name].get("gpus") and not _has_gpu_operations(facts, name):
            yield Finding(
                "warning",
                "no-gpu-operations",
                f"There is a GPU, and Horovod for {name} was built without GPU operations.",
                "What it sends of tensors on a GPU, it copies to the host and back.",
                "Install NCCL and CUDA's compiler and run scripts/setup.sh again "
                "(HOROVOD_GPU_OPERATIONS=NCCL).",
            )


# --- the machine ------------------------------------------------------------------------------------------


def host_name(facts: Facts, _: int) -> Iterator[Finding]:
    name, addresses = facts["host"].get("name"), facts["host"].get("resolves_to")
    if not addresses and name:
        yield Finding(
            "warning",
            "hostname-unresolved",
            f"This host's name, {name}, has no address"
            + ("." if addresses is not None else ", or the name server does not answer."),
            "What asks for the own address by name, as MPI and Gloo may, fails or waits for a long time.",
            f"Add a line with this machine's address and {name} to /etc/hosts.",
        )
    elif addresses and all(ipaddress.ip_address(one).is_loopback for one in addresses):
        yield Finding(
            "note",
            "hostname-loopback",
            f"This host's name, {name}, means only {', '.join(addresses)} here.",
            "It does not matter on one host. In a job with others, what asks for its own address by name "
            "announces one that leads nowhere.",
            f"For several hosts: give {name} the address that others reach it by, in /etc/hosts.",
        )


def interfaces(facts: Facts, _: int) -> Iterator[Finding]:
    if "error" not in facts["network"] and not external(facts["network"]):
        yield Finding(
            "note",
            "no-network",
            "There is no network interface with an address but the loopback.",
            "Ranks on this machine can meet; those of other machines cannot.",
            "For several hosts: connect this one.",
        )


def shared_memory(facts: Facts, _: int) -> Iterator[Finding]:
    size = facts["host"].get("shm_bytes")
    if size is not None and size < SMALL_SHM:
        yield Finding(
            "warning",
            "small-shm",
            f"/dev/shm has {size >> 20} MiB free.",
            "MPI, NCCL and torch's data loaders exchange data between processes there, and die of "
            "a bus error when it is full.",
            "In a container: docker run --shm-size=1g, or --ipc=host.",
        )


def cores(facts: Facts, ranks: int) -> Iterator[Finding]:
    usable, total = facts["host"].get("usable_cores"), facts["host"].get("cores")
    if not usable:
        return
    if ranks > usable:
        yield Finding(
            "warning",
            "more-ranks-than-cores",
            f"{ranks} ranks share {usable:g} cores.",
            "Horovod's ranks wait for each other by spinning, and keep each other from working.",
            "Start fewer ranks here; or, to test, set OMPI_MCA_mpi_yield_when_idle=1, and do not take times.",
        )
    threads = facts["torch"].get("threads")
    if threads and ranks > 1 and ranks * threads > usable:
        yield Finding(
            "warning",
            "oversubscription",
            f"{ranks} ranks of {threads} torch threads each share {usable:g} cores.",
            "Threads of OpenMP take turns on a core, and all of them wait for the last.",
            f"Set OMP_NUM_THREADS={max(1, int(usable // ranks))}, or call torch.set_num_threads. (mpirun: -x "
            "OMP_NUM_THREADS. horovodrun hands it on by itself.)",
        )
    each = facts["host"].get("cores_a_rank", usable)
    if total and each <= 1 < total:
        yield Finding(
            "warning",
            "bound",
            f"A rank may use {each:g} of {total} cores."
            if ranks > 1
            else f"This process may use {each:g} of {total} cores.",
            "mpirun binds each rank to a core unless told otherwise, and containers have quotas.",
            "mpirun --bind-to none (horovodrun says that by itself), or another quota.",
        )


def mpirun_as_root(facts: Facts, _: int) -> Iterator[Finding]:
    open_mpi = "Open MPI" in str(facts["mpi"].get("version"))
    if open_mpi and facts["host"].get("root") and not _may_be_root(facts):
        yield Finding(
            "note",
            "mpirun-as-root",
            "You are root, for whom Open MPI's mpirun starts nothing.",
            "horovodrun passes --allow-run-as-root by itself.",
            "Be another user; or mpirun --allow-run-as-root, in a container.",
        )


def single_copy(facts: Facts, _: int) -> Iterator[Finding]:
    open_mpi = "Open MPI" in str(facts["mpi"].get("version"))
    if (
        open_mpi
        and facts["host"].get("reads_other_processes") is False
        and facts["environment"].get("OMPI_MCA_btl_vader_single_copy_mechanism") != "none"
    ):
        yield Finding(
            "warning",
            "no-single-copy",
            "Processes may not read each other's memory here.",
            "Open MPI tries that between ranks of a host, and prints an error (Read -1, errno = 1) for each "
            "message, which is slow.",
            "export OMPI_MCA_btl_vader_single_copy_mechanism=none, or docker run --cap-add SYS_PTRACE.",
        )


def stated_bandwidth(facts: Facts, _: int) -> Iterator[Finding]:
    text = facts["environment"].get("HVD_QUANT_BANDWIDTH")
    try:
        fine = text is None or 0.0 < float(text) < float("inf")
    except ValueError:
        fine = False
    if not fine:
        yield Finding(
            "error",
            "bandwidth",
            f"HVD_QUANT_BANDWIDTH is {text!r}.",
            "hvd_quant's compressors refuse to be made.",
            "Set it to a positive number of Gbit/s, or unset it.",
        )


RULES: tuple[Callable[[Facts, int], Iterable[Finding]], ...] = (
    codec_works,
    frameworks_import,
    horovod_is_built,
    controllers,
    keras,
    gpus_are_used,
    host_name,
    interfaces,
    shared_memory,
    cores,
    mpirun_as_root,
    single_copy,
    stated_bandwidth,
)


def _built(facts: Facts, name: str) -> bool:
    return bool(facts[name].get("horovod", {}).get("built"))


def _may_be_root(facts: Facts) -> bool:
    names = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    return all(facts["environment"].get(name) == "1" for name in names)


def _has_gpu_operations(facts: Facts, name: str) -> bool:
    return any(facts[name]["horovod"][one] for one in ("nccl", "rocm"))


def external(network: Facts) -> dict[str, list[str]]:
    """Return addresses by interface, for those that are up and reachable from other machines."""
    return {
        name: nic["addresses"]
        for name, nic in network.items()
        if isinstance(nic, dict)
        and nic.get("up")
        and any(not ipaddress.ip_address(one).is_loopback for one in nic.get("addresses", ()))
    }
