"""An elastic job: where its hosts come from, and what its workers have to report."""

import json
import stat


def hosts_from(folder, hosts):
    """Options of ``horovodrun`` for these hosts, until another list is in the file."""
    (folder / "hosts").write_text("\n".join(hosts) + "\n")
    discover = folder / "discover.sh"
    discover.write_text(f"#!/bin/sh\ncat {folder}/hosts\n")
    discover.chmod(discover.stat().st_mode | stat.S_IXUSR)
    slots = sum(int(host.partition(":")[2]) for host in hosts)
    return ["-np", str(slots), "--min-np", "1", "--max-np", "4", "--host-discovery-script", discover]


def check(done, folder, sizes):
    """Check a job that has ended: it had one of these sequences of sizes, and lost no step.

    Returns:
        What its workers have reported.
    """
    assert done.returncode == 0, done.stdout[-8000:]
    reports = [json.loads(file.read_text()) for file in sorted(folder.glob("report.*.json"))]
    assert reports, done.stdout[-8000:]
    longest = max((report["sizes"] for report in reports), key=len)
    assert longest in sizes, reports
    assert len(reports) == longest[-1], done.stdout[-8000:]
    for report in reports:
        assert report["identical"], reports
        assert report["exact"], reports
        assert report["uses"] == 24, reports
    return reports
