"""Looks at the machines of a job and says what is odd."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace

from hvd_quant.cli import compare, facts, meeting, rules
from hvd_quant.cli.facts import Facts
from hvd_quant.cli.rules import Finding


def doctor(output: str | None, patience: float) -> int:
    """Diagnose this machine, or a launched job's machines, and report.

    Args:
        output: file to write JSON to, "-" for standard output; None for a report to read.
        patience: seconds to wait for other ranks.

    Returns:
        1 if something is found that will not work, else 0; the same on every rank.
    """
    place = meeting.launch()
    here = facts.gather() if place is None or place.local_rank == 0 else None
    alone = place is None or place.size == 1
    diagnosis = _alone(here) if alone else _together(here, place, output, patience)
    if place is None or place.rank == 0:
        _tell(diagnosis, output)
    return _status(diagnosis)


def _alone(here: Facts) -> Facts:
    return _diagnosis({_name(here): here}, rules.examine(here))


def _together(here: Facts | None, place: meeting.Launch, output: str | None, patience: float) -> Facts:
    """What all ranks find out together, the same on each; what this one has found, if they do not meet."""

    def no_meeting(error: str) -> Facts:
        own = here or facts.gather()
        finding = Finding(
            "error",
            "no-meeting",
            f"Rank {place.rank} of {place.size} did not come together with the others: {error}.",
            "A training job would wait, or fail, as this one did.",
            "Run hvd-quant doctor on each host by itself and compare. Then look for a firewall between them, "
            "for interfaces that lead nowhere (horovodrun --network-interface; mpirun --mca "
            "btl_tcp_if_include), and for a rank that ended before.",
        )
        return _diagnosis({_name(own): own}, [finding, *rules.examine(own, place.local_size)])

    def give_up(diagnosis: Facts) -> None:
        if place.rank == 0 or output is None:
            _tell(diagnosis, output)
        os._exit(_status(diagnosis))

    # A rank that has gathered no facts has come first.
    wait = patience if here is not None else patience + facts.PROBE_SECONDS
    os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] = str(max(1, int(wait)))
    try:
        with _alarm(wait, lambda: give_up(no_meeting(f"it has waited for {wait:g} s"))):
            met = meeting.meet()
            everyone = met.gather(here)  # None of ranks that leave it to another one on their host
            clocks = met.gather((_own_name(), time.time()))
        diagnosis = _of_all(met, everyone, clocks)
        with _alarm(patience, lambda: give_up(_stuck(diagnosis, patience))):
            return _measured(diagnosis, met)
    except Exception as error:
        return no_meeting(facts.describe(error))


@contextlib.contextmanager
def _alarm(seconds: float, action: Callable[[], object]) -> Iterator[None]:
    """Take action unless the context ends in time; what it waits for cannot be interrupted."""
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _of_all(met: meeting.Meeting, everyone: list[Facts | None], clocks: list[tuple[str, float]]) -> Facts:
    """What the facts of all hosts, and the name and time that each rank has told, amount to."""
    told = [(_name(one), one) for one in everyone if one is not None]
    times = dict(clocks)
    hosts = {name: {**one, "clock": times[name]} for name, one in told}
    ranks = {name: sum(own == name for own, _ in clocks) for name in hosts}
    own = [
        replace(finding, where=name)
        for name, one in hosts.items()
        for finding in rules.examine(one, ranks[name])
    ]
    findings = [*_merge(own, len(hosts)), *compare.same_names(told), *compare.compare(hosts)]
    return _diagnosis(hosts, findings) | {"by": met.by, "size": met.size, "ranks": ranks}


def _measured(diagnosis: Facts, met: meeting.Meeting) -> Facts:
    """A diagnosis, and how fast the ranks exchange something."""
    from hvd_quant.cli import measure

    if met.size == 1:
        return diagnosis
    speeds = measure.measure(met)
    hosts = diagnosis["hosts"]
    codecs = [one["codec"] for one in hosts.values() if "encode_values_s" in one["codec"]]
    if not codecs:
        return diagnosis
    slowest = min(codecs, key=lambda codec: codec["encode_values_s"])
    steps = measure.predict(speeds, met.size, slowest)
    hurts = measure.judge(speeds, steps, met.size, one_host=len(hosts) == 1)
    return _with(diagnosis, *hurts) | {"measured": measure.as_json(speeds, steps)}


def _stuck(diagnosis: Facts, patience: float) -> Facts:
    finding = Finding(
        "error",
        "stuck",
        f"Small messages arrive, and large ones took more than {patience:g} s.",
        "A training job would stop at its first gradients.",
        "Look for different MTUs (ip link), and for a network that is slower than expected; --patience makes "
        "this command wait for longer.",
    )
    return _with(diagnosis, finding)


def _merge(findings: list[Finding], hosts: int) -> list[Finding]:
    """Findings that are the same on several hosts, told once."""
    merged: dict[Finding, list[str]] = {}
    for finding in findings:
        merged.setdefault(replace(finding, where=""), []).append(finding.where)
    return [
        finding if len(where) == hosts else replace(finding, where=", ".join(where))
        for finding, where in merged.items()
    ]


def _diagnosis(hosts: Facts, findings: Iterable[Finding]) -> Facts:
    ordered = rules.ordered(findings)
    return {
        "healthy": all(finding.level != "error" for finding in ordered),
        "hosts": hosts,
        "findings": [asdict(finding) for finding in ordered],
    }


def _with(diagnosis: Facts, *findings: Finding) -> Facts:
    """A diagnosis with more findings."""
    before = [Finding(**one) for one in diagnosis["findings"]]
    return diagnosis | _diagnosis(diagnosis["hosts"], [*before, *findings])


def _status(diagnosis: Facts) -> int:
    return 0 if diagnosis["healthy"] else 1


def _own_name() -> str:
    return facts.guarded(facts.name).get("name", "this machine")


def _name(one: Facts) -> str:
    return str(one["host"].get("name", "this machine"))


def _tell(diagnosis: Facts, output: str | None) -> None:
    if output is None:
        from hvd_quant.cli import report

        report.show(diagnosis)
    elif output == "-":
        print(json.dumps(diagnosis, indent=2), flush=True)
    else:
        try:
            with open(output, "w") as file:
                json.dump(diagnosis, file, indent=2)
        except OSError as error:
            print(f"hvd-quant doctor: cannot write {output}: {error}", file=sys.stderr)
