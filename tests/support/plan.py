"""What happens in an elastic job: its workers follow a plan, see tests/ranks/torch/elastic.py."""

import time


def follow(plan, state, step, hvd, folder):
    """Have happen what the plan says of this step; returns when this worker dies, or None."""
    if state.event == len(plan) or plan[state.event]["at"] != step:
        return None
    event = plan[state.event]
    state.event += 1
    state.commit()
    if "hosts" in event and hvd.rank() == 0:
        (folder / "hosts").write_text("\n".join(event["hosts"]) + "\n")
    changes = "hosts" in event and "kill" not in event
    while changes or event.get("size", hvd.size()) != hvd.size():
        state.check_host_updates()
        time.sleep(0.05)
    return event["when"] if hvd.rank() in event.get("kill", []) else None
