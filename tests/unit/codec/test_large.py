"""What needs more memory than a unit test should."""

from pathlib import Path

import numpy as np
import pytest

from hvd_quant import QSGD
from hvd_quant.codec import native


def available_memory():
    """Bytes that may be used without swapping, as the kernel and the container see it; 0 if unknown."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, KeyError, ValueError):
        return locals().get("free", 0)
    return free


@pytest.mark.skipif(available_memory() < 10 * 2**30, reason="needs 10 GiB of available memory")
def test_more_values_than_32_bits_count(monkeypatch):
    monkeypatch.setenv("HVD_QUANT_THREADS", "2")
    count = 2**31 + 2**20 + 5
    values = np.zeros(count, np.float16)  # pages that are only read take no memory
    places = [0, 2**31 - 1, 2**31, 2**31 + 4097, count - 1]
    values[places] = [1, -2, 3, -4, 5]
    scheme = QSGD(bits=2, bucket_size=2**10)
    payload = native.encode(values, scheme, 0)
    del values
    out = np.empty(count, np.float16)
    native.decode_mean([payload], out)
    # Each bucket holds zeros and perhaps one value, its norm, so all is exact; the values 2^31 - 1 and 2^31
    # are in different buckets.
    np.testing.assert_array_equal(out[places], [1, -2, 3, -4, 5])
    out[places] = 0
    patterns = out.view(np.uint16)
    assert not any(patterns[start : start + 2**27].any() for start in range(0, count, 2**27))
