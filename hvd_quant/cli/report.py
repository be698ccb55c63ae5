"""Print a diagnosis: with colours on a terminal, as plain lines elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator

from hvd_quant.cli.facts import Facts
from hvd_quant.cli.rules import LEVELS, Finding

COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan", "title": "bold", "good": "bold green"}
Line = tuple[str, str]  # style (a key of COLOURS, or empty), text


def show(diagnosis: Facts) -> None:
    """Print a diagnosis, as `hvd_quant.cli.doctor.doctor` makes it, on standard output."""
    console = None
    if sys.stdout is None:  # closed
        raise OSError("standard output is closed")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # variables may hold anything
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        try:
            from rich.console import Console

            console = Console(highlight=False)
        except ImportError:
            pass  # optional; plain lines say the same
    for style, text in _lines(diagnosis):
        if console is None:
            print(text)
        else:
            console.print(text, style=COLOURS.get(style), markup=False, soft_wrap=False)
    sys.stdout.flush()


def _lines(diagnosis: Facts) -> Iterator[Line]:
    hosts = diagnosis["hosts"]
    for name, facts in hosts.items():
        yield "title", f"{name}" + (f" ({diagnosis['ranks'][name]} ranks)" if diagnosis.get("ranks") else "")
        for what, text in _about(facts):
            yield "", f"  {what:<12} {text}"
    if measured := diagnosis.get("measured"):
        yield "", ""
        yield from _speeds(measured, diagnosis)
    findings = [Finding(**one) for one in diagnosis["findings"]]
    for finding in findings:
        yield "", ""
        where = f" on {finding.where}" if finding.where else ""
        yield finding.level, f"{finding.level.upper()} {finding.name}{where}"
        yield "", f"  {finding.what}"
        yield "", f"  {finding.why}"
        yield "", f"  -> {finding.do}"
    yield "", ""
    yield _verdict(findings, len(hosts))


def _verdict(findings: Iterable[Finding], hosts: int) -> Line:
    counts = {level: sum(finding.level == level for finding in findings) for level in LEVELS}
    summary = ", ".join(
        f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items() if count
    )
    who = "This machine is" if hosts == 1 else f"These {hosts} hosts are"
    if counts["error"]:
        return "error", f"{who} not ready: {summary}."
    if counts["warning"]:
        return "warning", f"{who} ready, with reservations: {summary}."
    return "good", f"{who} healthy" + (f" ({summary})." if summary else ".")


def _about(facts: Facts) -> Iterator[tuple[str, str]]:
    """Describe a machine, one line per fact; facts that could not be found out are included."""
    for title, describe in _LINES.items():
        try:
            text = describe(facts)
        except Exception:
            text = "could not be found out"
        if text:
            yield title, text


def _host(facts: Facts) -> str:
    host = facts["host"]
    cores = f"{host['usable_cores']:g} of {host['cores']} cores"
    return f"{host['system']}, {host['cpu']}, {cores}"


def _python(facts: Facts) -> str:
    return f"{facts['python']['version']} ({facts['python']['executable']})"


def _framework(facts: Facts, name: str) -> str:
    found = facts[name]
    if not found.get("installed"):
        return "not installed"
    if "error" in found:
        return f"cannot be imported: {found['error']}"
    extras = [f"CUDA {found['cuda']}" if found.get("cuda") else "CPU build", f"{found['gpus']} GPUs"]
    if found.get("keras"):
        extras.append(f"Keras {found['keras']}")
    return f"{found['version']} ({', '.join(extras)}); {_horovod(found['horovod'])}"


def _horovod(built: Facts) -> str:
    if not built["built"]:
        return "Horovod is not built for it"
    means = [name for name, title in (("mpi", "MPI"), ("gloo", "Gloo")) if built[name] for name in [title]]
    operations = "NCCL" if built["nccl"] else "ROCm" if built["rocm"] else "none"
    return f"Horovod with {', '.join(means) or 'no controller'}; GPU operations: {operations}"


def _packages(facts: Facts) -> str:
    names = ("hvd_quant", "horovod", "mpi4py", "numpy")
    return ", ".join(f"{name} {facts['packages'][name] or '-'}" for name in names)


def _codec(facts: Facts) -> str:
    codec = facts["codec"]
    if "error" in codec:
        return codec["error"]
    rates = f"{codec['encode_values_s'] / 1e9:.2f} and {codec['decode_values_s'] / 1e9:.2f} * 10^9 values/s"
    return f"{codec['isa']}, self-test passed; encodes and decodes {rates} at 4 bits"


def _network(facts: Facts) -> str:
    if "error" in facts["network"]:
        return facts["network"]["error"]
    return "; ".join(
        f"{name} {', '.join(nic['addresses'])} (MTU {nic['mtu']})"
        for name, nic in facts["network"].items()
        if nic["up"] and nic["addresses"] and name != "lo"
    )


_LINES = {
    "machine": _host,
    "Python": _python,
    "packages": _packages,
    "torch": lambda facts: _framework(facts, "torch"),
    "TensorFlow": lambda facts: _framework(facts, "tensorflow"),
    "MPI": lambda facts: facts["mpi"].get("error") or facts["mpi"]["version"] or "no mpirun in PATH",
    "GPUs": lambda facts: ", ".join(facts["gpus"]["names"]) or "none",
    "codec": _codec,
    "network": _network,
    "variables": lambda facts: " ".join(f"{name}={value}" for name, value in facts["environment"].items()),
}


def _speeds(measured: Facts, diagnosis: Facts) -> Iterator[Line]:
    yield "title", f"between {diagnosis['size']} ranks, by {diagnosis['by']}"
    for name, speed in measured["collectives"].items():
        rate = f"{speed['rate'] / 1e6:8.1f} MB/s"
        yield "", f"  {name:<12} {1e3 * speed['latency']:6.2f} ms empty, {rate} received by a rank"
    yield "title", f"a step's gradients of {measured['parameters'] / 1e6:.1f} M parameters, by these figures"
    best = min(measured["step_seconds"].values())
    for name, seconds in measured["step_seconds"].items():
        yield "good" if seconds == best else "", f"  {name:<26} {1e3 * seconds:8.1f} ms"
