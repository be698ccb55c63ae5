"""The stall check, with a clock of its own."""

import contextlib
import threading

import pytest

from hvd_quant.reducer import stall
from hvd_quant.reducer.stall import StallCheck, enumeration, stall_seconds


class Operations:
    def __init__(self):
        self.now = []
        self.check = StallCheck(lambda _: self.now, lambda keys, _: ["rank 1 of 3", f"operations {keys}"])

    def poll(self, seconds):
        return self.check.poll(seconds, 60.0)


def test_what_is_in_flight_for_too_long_is_said_once():
    operations = Operations()
    operations.now = [7]
    assert operations.poll(0.0) is None
    operations.now = [7, 8]
    assert operations.poll(59.0) is None
    message = operations.poll(60.0)
    assert message.startswith("rank 1 of 3 has waited 60 s for other ranks.\n  operations [7]")
    # What was there when it was said is part of the same stall; what comes later is another.
    assert operations.poll(119.0) is None
    assert operations.poll(200.0) is None
    operations.now = [7, 9]
    assert operations.poll(201.0) is None
    assert operations.poll(260.0) is None
    assert "operations [7, 9]" in operations.poll(261.0)


def test_what_comes_back_in_time_is_not_said():
    operations = Operations()
    for second in range(0, 600, 50):
        operations.now = [second]
        assert operations.poll(float(second)) is None
    operations.now = []
    assert operations.poll(1000.0) is None


def test_the_line_that_waits_is_said(monkeypatch):
    """Of threads that have called Horovod, or us: here a stand-in for that."""
    monkeypatch.setattr(stall, "_LIBRARIES", ("hvd_quant", "threading"))
    event, waiting = threading.Event(), threading.Event()

    def wait_for_others():
        waiting.set()
        with contextlib.suppress(TypeError):  # a bool has no keys
            StallCheck(lambda _: event.wait(), lambda *_: []).poll(0.0, 60.0)  # a wait within hvd_quant

    thread = threading.Thread(target=wait_for_others, name="training")
    thread.start()
    waiting.wait()
    try:
        places = []
        while not any(place.startswith("training") for place in places):  # until it has come so far
            places = stall._places()
        assert any(place.startswith("training is at ") and "StallCheck(lambda" in place for place in places)
        assert not any(place.startswith(("MainThread", "hvd_quant stall")) for place in places)  # who ask
    finally:
        event.set()
        thread.join()


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({}, 60.0),
        ({"HOROVOD_STALL_CHECK_TIME_SECONDS": "5"}, 5.0),
        ({"HOROVOD_STALL_CHECK_TIME_SECONDS": "7s"}, 7.0),
        ({"HOROVOD_STALL_CHECK_TIME_SECONDS": "0"}, None),
        ({"HOROVOD_STALL_CHECK_TIME_SECONDS": "soon"}, None),
        ({"HOROVOD_STALL_CHECK_DISABLE": "1"}, None),
        ({"HOROVOD_STALL_CHECK_DISABLE": "0"}, 60.0),
    ],
)
def test_horovods_settings(monkeypatch, variables, seconds):
    for variable in ("HOROVOD_STALL_CHECK_TIME_SECONDS", "HOROVOD_STALL_CHECK_DISABLE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert stall_seconds() == seconds


def test_enumeration():
    assert enumeration("abc") == "a, b, c"
    assert enumeration("abcdefg") == "a, b, c, d, e and 2 more"
