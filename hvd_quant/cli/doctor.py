"""Check the machines of a job and report what is odd."""

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

# A launcher ends all ranks when one has failed: the first must have reported what it knows by then.
GRACE_SECONDS = 5.0


def doctor(output: str | None, patience: float) -> int:
    """Diagnose this machine, or a launched job's machines, and report.

    Args:
        output: file to write JSON to, "-" for standard output; None for a report to read.
        patience: seconds to wait for other ranks.

    Returns:
        1 if something is found that will not work, or the output cannot be written, else 0.
    """
    place = meeting.launch()
    here = facts.gather() if place is None or place.local_rank == 0 else None
    alone = place is None or place.size == 1
    diagnosis = _alone(here) if alone else _together(here, place, output, patience)
    written = _write_report(diagnosis, output) if place is None or place.rank == 0 else True
    return _status(diagnosis) if written else 1


def _alone(here: Facts) -> Facts:
    return _diagnosis({_name(here): here}, rules.examine(here))


def _together(here: Facts | None, place: meeting.Launch, output: str | None, patience: float) -> Facts:
    """Diagnose with all ranks, the same on each; this one's own findings, if they do not meet."""

    def no_meeting(error: str) -> Facts:
        own = here or facts.gather()
        found = rules.examine(own, place.local_size)
        return _diagnosis({_name(own): own}, [_not_met(place, error), *found])

    def give_up(diagnose: Callable[[], Facts]) -> None:
        try:
            diagnosis = diagnose()
            if place.rank == 0 or output is None:
                _write_report(diagnosis, output)
            if place.rank != 0:
                time.sleep(GRACE_SECONDS)
        finally:
            os._exit(1)

    # A rank that gathers no facts is early, and waits until the others have gathered theirs.
    wait = patience if here is not None else patience + facts.PROBE_SECONDS
    os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] = str(max(1, int(wait)))
    try:
        with _alarm(wait, lambda: give_up(lambda: no_meeting(f"it has waited for {wait:g} s"))):
            met = meeting.meet()
            if met.size != place.size:
                if place.rank != 0:  # which finds the same and reports it, unless the launcher ends it first
                    return _diagnosis({}, [])
                return no_meeting(
                    f"by {met.by} it is one of {met.size}, so the launcher and Horovod, or mpi4py, go by "
                    "different means (another MPI, or Gloo under mpirun)"
                )
            everyone = met.gather(here)  # None from ranks that leave it to another one on their host
            sent = met.gather((facts.own_name(), time.time(), sorted(os.sched_getaffinity(0))))
    except Exception as error:
        return no_meeting(facts.describe(error))
    diagnosis = _combine(met, everyone, sent)
    try:
        with _alarm(patience, lambda: give_up(lambda: _with(diagnosis, _stuck(patience)))):
            return _measured(diagnosis, met)
    except Exception as error:
        return _with(diagnosis, _not_measured(facts.describe(error)))


@contextlib.contextmanager
def _alarm(seconds: float, action: Callable[[], object]) -> Iterator[None]:
    """Call the action unless the context ends in time; what it waits for cannot be interrupted."""
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _combine(
    met: meeting.Meeting, everyone: list[Facts | None], sent: list[tuple[str, float, list[int]]]
) -> Facts:
    """Merge the facts of all hosts with the host name, clock and cores that each rank has sent."""
    reported = [(_name(one), one) for one in everyone if one is not None]
    hosts: Facts = {}
    for name, one in reported:
        own = [(clock, set(cores)) for host, clock, cores in sent if host == name]
        hosts[name] = {**one, "host": _with_cores(one["host"], [cores for _, cores in own])}
        hosts[name] |= {"clock": own[0][0]} if own else {}
    ranks = {name: sum(own == name for own, _, _ in sent) for name in hosts}
    found = [
        replace(finding, where=name)
        for name, one in hosts.items()
        for finding in rules.examine(one, ranks[name])
    ]
    findings = [*_merge(found, len(hosts)), *compare.same_names(reported), *compare.compare(hosts)]
    return _diagnosis(hosts, findings) | {"by": met.by, "size": met.size, "ranks": ranks}


def _with_cores(host: Facts, cores: list[set[int]]) -> Facts:
    """Return a host's facts, with the cores that its ranks may use together, and each of them."""
    usable = host.get("usable_cores")
    if usable is None or not cores:
        return host
    each = min(map(len, cores))
    together = len(set.union(*cores))
    # A quota holds for all of them, and is less than what the first rank may use by its affinity.
    quota = usable if usable < len(cores[0]) else together
    return {**host, "usable_cores": min(together, quota), "cores_a_rank": min(each, quota)}


def _measured(diagnosis: Facts, met: meeting.Meeting) -> Facts:
    """Return a diagnosis with the measured speed of the ranks' collectives."""
    from hvd_quant.cli import measure

    speeds = measure.measure(met)
    hosts, ranks = diagnosis["hosts"], set(diagnosis["ranks"].values())
    codecs = [one["codec"] for one in hosts.values() if "encode_values_s" in one["codec"]]
    if not codecs:
        return diagnosis
    slowest = min(codecs, key=lambda codec: codec["encode_values_s"])
    steps = measure.predict(speeds, met.size, slowest)
    diagnosis |= {"measured": measure.as_json(speeds, steps)}
    hierarchical = len(hosts) > 1 and len(ranks) == 1 and ranks != {1}
    return _with(diagnosis, *measure.judge(speeds, steps, met.size, len(hosts) == 1, hierarchical))


# --- failures between ranks -------------------------------------------------------------------------------


def _not_met(place: meeting.Launch, error: str) -> Finding:
    return Finding(
        "error",
        "no-meeting",
        f"Rank {place.rank} of {place.size} did not come together with the others: {error}.",
        "A training job would wait, or fail, as this one did.",
        "Run hvd-quant doctor on each host by itself and compare. Then look for a firewall between them, for "
        "interfaces that lead nowhere (horovodrun --network-interface; mpirun --mca btl_tcp_if_include), and "
        "for a rank that ended before.",
    )


def _stuck(patience: float) -> Finding:
    return Finding(
        "error",
        "stuck",
        f"Small messages arrive, and large ones took more than {patience:g} s.",
        "A training job would stop at its first gradients.",
        "Look for different MTUs (ip link), a rank that ended, and a network that is slower than expected; "
        "--patience makes this command wait for longer.",
    )


def _not_measured(error: str) -> Finding:
    return Finding(
        "error",
        "not-measured",
        f"The ranks have met, and then could not exchange anything: {error}.",
        "A training job would fail, too.",
        "Read the message; then look at the ranks' own output.",
    )


# --- diagnoses --------------------------------------------------------------------------------------------


def _merge(findings: list[Finding], hosts: int) -> list[Finding]:
    """Merge findings that are the same on several hosts."""
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
    """Return a diagnosis with more findings."""
    before = [Finding(**one) for one in diagnosis["findings"]]
    return diagnosis | _diagnosis(diagnosis["hosts"], [*before, *findings])


def _status(diagnosis: Facts) -> int:
    return 0 if diagnosis["healthy"] else 1


def _name(one: Facts) -> str:
    return str(one["host"].get("name") or facts.own_name())


def _write_report(diagnosis: Facts, output: str | None) -> bool:
    """Write the report; returns whether that succeeded."""
    try:
        if output is None:
            from hvd_quant.cli import report

            report.show(diagnosis)
        elif output == "-":
            if sys.stdout is None:
                raise OSError("standard output is closed")
            print(json.dumps(diagnosis, indent=2), flush=True)
        else:
            with open(output, "w") as file:
                json.dump(diagnosis, file, indent=2)
    except OSError as error:
        with contextlib.suppress(Exception):
            print(f"hvd-quant doctor: cannot write {output or 'the report'}: {error}", file=sys.stderr)
        with contextlib.suppress(Exception):  # or the interpreter would try to write the rest when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True
