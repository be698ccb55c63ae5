"""Rules about differences between hosts, judged from the facts of each."""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

from hvd_quant.cli.facts import Facts
from hvd_quant.cli.rules import Finding, external, ordered, run_all

CLOCK_SECONDS = 1.0
Hosts = Mapping[str, Facts]


def compare(hosts: Hosts) -> list[Finding]:
    """Return all findings about hosts, the worst first.

    Args:
        hosts: facts of each host by its name, as `hvd_quant.cli.facts.gather` returns them, and ``"clock"``,
            the seconds since 1970 at about the same moment.
    """
    return ordered(run_all((rule, (hosts,)) for rule in RULES)) if len(hosts) > 1 else []


def _same(hosts: Hosts, section: str, of: Callable[[Facts], object]) -> dict[str, list[str]]:
    """Group the hosts' names by what they have, as far as that is known."""
    having: defaultdict[str, list[str]] = defaultdict(list)
    for name, facts in hosts.items():
        if "error" not in facts[section]:
            having[str(of(facts))].append(name)
    return dict(having)


def _join(having: dict[str, list[str]]) -> str:
    return "; ".join(f"{what} on {', '.join(names)}" for what, names in having.items())


def versions(hosts: Hosts) -> Iterator[Finding]:
    packages = sorted({name for facts in hosts.values() for name in facts["packages"]} - {"error"})
    questions: dict[str, tuple[str, Callable[[Facts], object]]] = {
        "Python": ("python", lambda facts: ".".join(str(facts["python"].get("version")).split(".")[:2])),
        "MPI": ("mpi", lambda facts: facts["mpi"].get("version")),
        **{
            name: ("packages", lambda facts, name=name: facts["packages"].get(name) or "not installed")
            for name in packages
        },
    }
    for name, (section, question) in questions.items():
        having = _same(hosts, section, question)
        if len(having) > 1:
            grave = name in ("hvd_quant", "horovod")
            yield Finding(
                "error" if grave else "warning",
                "versions-differ",
                f"{name}: {_join(having)}.",
                "Ranks that talk by different rules end in errors at best."
                if grave
                else "The same script may compute something else, or exchange other gradients.",
                "Install the same release everywhere, or share one installation.",
            )


def builds(hosts: Hosts) -> Iterator[Finding]:
    for name in ("torch", "tensorflow"):
        having = _same(
            hosts,
            name,
            lambda facts, name=name: (
                ", ".join(one for one in ("mpi", "gloo", "nccl") if facts[name].get("horovod", {}).get(one))
                or "nothing"
            ),
        )
        if len(having) > 1:
            yield Finding(
                "warning",
                "builds-differ",
                f"Horovod for {name} was built with {_join(having)}.",
                "Ranks must talk by the same means.",
                "Build Horovod alike everywhere, or share one installation.",
            )


def variables(hosts: Hosts) -> Iterator[Finding]:
    names = sorted({name for facts in hosts.values() for name in facts["environment"]} - {"error"})
    for name in names:
        having = _same(hosts, "environment", lambda facts, name=name: facts["environment"].get(name))
        if len(having) > 1 and name == "HVD_QUANT_BANDWIDTH":
            yield Finding(
                "error",
                "variables-differ",
                f"{name}: {_join(having)}.",
                "Ranks that choose their exchange by different figures are a RankMismatchError.",
                "Hand it to all ranks: mpirun -x HVD_QUANT_BANDWIDTH (horovodrun does so by itself).",
            )


def gpus(hosts: Hosts) -> Iterator[Finding]:
    having = _same(hosts, "gpus", lambda facts: bool(facts["gpus"].get("names")))
    if len(having) > 1:
        with_gpu, without = having["True"], having["False"]
        yield Finding(
            "warning",
            "gpus-differ",
            f"There are GPUs on {', '.join(with_gpu)}, and none on {', '.join(without)}.",
            "hvd_quant refuses ranks of which only some compute on a GPU; the others would be slow, too.",
            "Leave out the hosts without.",
        )


def interface_names(hosts: Hosts) -> Iterator[Finding]:
    names = {
        host: external(facts["network"]) for host, facts in hosts.items() if "error" not in facts["network"]
    }
    if len(names) < 2 or set.intersection(*(set(one) for one in names.values())):
        return
    names_by_host = "; ".join(f"{', '.join(one) or 'none'} on {host}" for host, one in names.items())
    yield Finding(
        "error",
        "interfaces-differ",
        f"No network interface has the same name on all hosts: {names_by_host}.",
        "horovodrun looks for one that has, and so does Gloo, with --network-interface.",
        "Give the interfaces one name, by ip link or a udev rule; or start the job with mpirun and --mca "
        "btl_tcp_if_include NETWORK/BITS, which goes by addresses.",
    )


def shared_networks(hosts: Hosts) -> Iterator[Finding]:
    """Find addresses that several hosts have: each reaches itself by them, as on Docker's own bridge."""
    having: defaultdict[str, list[str]] = defaultdict(list)
    for host, facts in hosts.items():
        for nic, addresses in external(facts["network"]).items():
            for address in addresses:
                if not ipaddress.ip_address(address).is_loopback:
                    having[f"{address} ({nic})"].append(host)
    for address, names in having.items():
        if len(names) > 1:
            nic = address.partition("(")[2].rstrip(")")
            yield Finding(
                "warning",
                "same-address",
                f"{' and '.join(names)} both have the address {address}.",
                "A rank that connects to the other by it reaches itself, and waits.",
                f"Keep {nic} out: horovodrun --network-interface another; "
                f"mpirun --mca btl_tcp_if_exclude lo,{nic} --mca oob_tcp_if_exclude lo,{nic}.",
            )


def packet_sizes(hosts: Hosts) -> Iterator[Finding]:
    known = [facts["network"] for facts in hosts.values() if "error" not in facts["network"]]
    common = set.intersection(*map(set, map(external, known))) if known else set()
    for nic in sorted(common):
        having = _same(hosts, "network", lambda facts, nic=nic: facts["network"][nic].get("mtu"))
        if len(having) > 1:
            yield Finding(
                "warning",
                "mtu-differs",
                f"The MTU of {nic} is {_join(having)}.",
                "Where path MTU discovery fails, large messages vanish and small ones "
                "arrive: a job stops at its first gradient.",
                f"ip link set {nic} mtu N, with the same N everywhere.",
            )


def clocks(hosts: Hosts) -> Iterator[Finding]:
    times = {name: facts["clock"] for name, facts in hosts.items() if "clock" in facts}
    if not times:
        return
    first, last = min(times, key=times.__getitem__), max(times, key=times.__getitem__)
    if times[last] - times[first] > CLOCK_SECONDS:
        yield Finding(
            "warning",
            "clocks-differ",
            f"The clock of {last} is {times[last] - times[first]:.1f} s ahead of {first}'s.",
            "Logs cannot be laid side by side, and files on a shared disk seem to come from the future.",
            "Have all hosts follow a time server (chrony, systemd-timesyncd).",
        )


RULES: tuple[Callable[[Hosts], Iterable[Finding]], ...] = (
    versions,
    builds,
    variables,
    gpus,
    interface_names,
    shared_networks,
    packet_sizes,
    clocks,
)


def same_names(hosts: Iterable[tuple[str, Facts]]) -> list[Finding]:
    """Return the findings about hosts with one name, of which `compare` is given only one.

    Args:
        hosts: the name of every host that has reported, with its facts.
    """
    addresses: defaultdict[str, set[str]] = defaultdict(set)
    for name, facts in hosts:
        addresses[name].add(str(sorted(external(facts["network"]).items())))
    return [
        Finding(
            "error",
            "same-hostname",
            f"{len(networks)} hosts have the name {name}.",
            "Horovod and MPI take ranks on hosts of one name for neighbours, who share memory.",
            "Give each host a name of its own (hostnamectl set-hostname; docker run --hostname).",
        )
        for name, networks in addresses.items()
        if len(networks) > 1
    ]
