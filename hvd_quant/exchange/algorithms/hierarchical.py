"""The ranks of a host average their gradients as they are, and the hosts exchange these means encoded.

Every rank averages, encodes and sends one chunk of its host's gradients to its counterparts on the other
hosts, and relays to its neighbours what it receives from them. One rounding, of a host's mean. With h hosts,
all ranks of a host together receive h - 1 payloads from others, however many they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from hvd_quant.codec.message import Messages, cut
from hvd_quant.exchange.algorithms.base import Algorithm, BucketData, Encoded, Stage, encode_mean, pack_chunks
from hvd_quant.exchange.cost import SHARED_MEMORY, Link
from hvd_quant.exchange.layout import GroupLayout
from hvd_quant.exchange.transport import Buffer


def _collect(data: BucketData, _: Messages) -> tuple[Buffer, list[int]]:
    """Pack the values of each of the host's chunks for the rank that averages it, with the parts' sizes."""
    bucket = data.bucket
    preambles = [bucket.raw_preamble(number) for number in range(len(bucket.neighbours))]
    return pack_chunks(data, bucket.host_chunks, bucket.neighbours, preambles)


def _encode_host_mean(data: BucketData, parts: Messages) -> tuple[Buffer, list[int]]:
    """Encode the mean of the own chunk of the host's gradients, from what all neighbours have sent."""
    bucket = data.bucket
    number = bucket.own_host_chunk
    chunk = bucket.host_chunks[number]
    mean = data.buffer("mean", chunk.count, "float32")
    data.codec.mean_float32(parts.of(bucket.neighbours), bucket.raw_preamble(number), mean)
    message = encode_mean(data, mean, chunk, "host", len(bucket.neighbours))
    data.encoded_bytes = len(message) * len(bucket.neighbours)
    return _repeat(data, [message], bucket.counterparts)


def _pass_on(data: BucketData, parts: Messages) -> tuple[Buffer, list[int]]:
    """Relay what the counterparts have sent to the neighbours."""
    bucket = data.bucket
    return _repeat(data, [parts[rank] for rank in bucket.counterparts], bucket.neighbours)


def _repeat(data: BucketData, messages: Sequence[Buffer], ranks: Sequence[int]) -> tuple[Buffer, list[int]]:
    """Repeat messages, back to back, for each of some ranks; returns them with the parts' sizes."""
    size = sum(map(len, messages))
    sizes = [size if rank in ranks else 0 for rank in range(data.bucket.size)]
    out = data.codec.empty(sum(sizes), "uint8", data.values[0])
    end = 0
    for message in list(messages) * len(ranks):
        out[end : end + len(message)] = message
        end += len(message)
    return out, sizes


def _encoded(bucket: GroupLayout, parts: Messages) -> Encoded:
    """Return what the neighbours have relayed: for each of the host's chunks, the messages of all hosts."""
    encoded = []
    for neighbour, chunk in zip(bucket.neighbours, bucket.host_chunks, strict=True):
        senders = bucket.topology.counterparts(neighbour)
        sizes, source = [chunk.fixed_size] * len(senders), f" that rank {neighbour} has passed on"
        encoded.append((chunk, cut(parts[neighbour], sizes, senders, source)))
    return encoded


def _seconds(link: Link, size: int, payload_bytes: int, count: int) -> float:
    here = link.ranks_per_host
    hosts = size / here
    local = (1 - 1 / here) * (4 * count + hosts * payload_bytes)
    exchanged = link.seconds(3, (hosts - 1) * payload_bytes, (hosts + 1 / here) * count)
    return exchanged + local / SHARED_MEMORY


def _fits(count: int) -> bool:
    """Check the size: values are sent as float32, and their bytes are counted in 32 bits."""
    return 4 * count < 2**31


HIERARCHICAL = Algorithm(
    "hierarchical",
    (
        Stage("host", "alltoall", _collect),
        Stage("across", "alltoall", _encode_host_mean),
        Stage("pass", "alltoall", _pass_on),
    ),
    _encoded,
    _seconds,
    _fits,
    hierarchical=True,
)
