"""Starts what the multi-rank tests run on several ranks."""

import os
import subprocess

import pytest


def launch(command, seconds, **environment):
    """Run a launcher's command, stdout and stderr as one; a hang of so many seconds fails the test."""
    # There may be more ranks than cores: waiting must not keep others from working.
    yielding = {"OMP_NUM_THREADS": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}
    try:
        return subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            env={**os.environ, **yielding, **environment},
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"hung for {seconds} s:\n{(error.stdout or b'').decode()[-8000:]}")
