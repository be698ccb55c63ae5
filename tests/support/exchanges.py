"""Exchanges over ranks in one process, driven in turn."""

import numpy as np

from hvd_quant.codec import native
from hvd_quant.exchange.algorithms import ALGORITHMS, BucketData
from hvd_quant.exchange.driver import Exchange
from hvd_quant.exchange.in_process import Network
from hvd_quant.exchange.layout import Entry, GroupLayout
from hvd_quant.exchange.topology import Topology


def entries_of(counts, scheme):
    return [Entry(f"p{i}", count, "float32", scheme) for i, count in enumerate(counts)]


def topology_of(ranks):
    """Two ranks on every host, where their number is even: not neighbours by their numbers."""
    return Topology([rank % (ranks // 2) if ranks % 2 == 0 else rank for rank in range(ranks)])


def start(network, gradients, scheme, exchange, seed=0, use=0, codec=native, topology=None):
    """All ranks' exchanges; ``gradients[rank][i]`` is rank's gradient i."""
    topology = topology or topology_of(network.size)
    counts = [gradient.size for gradient in gradients[0]]
    uses = np.full(len(counts), use, np.uint64)
    exchanges = []
    for rank, transport in enumerate(network.ranks):
        bucket = GroupLayout(entries_of(counts, scheme), network.size, rank, seed, topology)
        data = BucketData(bucket, gradients[rank], uses, codec)
        exchanges.append(Exchange(data, ALGORITHMS[exchange], transport, "x"))
    return exchanges


def go_on(exchanges):
    """Take all to their last collectives, though one thread drives them."""
    for _ in range(2):
        for one in exchanges:
            one.advance(wait=False)
    assert all(one.advance(wait=False) for one in exchanges)


def finish(exchanges):
    go_on(exchanges)
    results = []
    for one in exchanges:
        out = [np.full_like(value, np.nan) for value in one.data.values]
        assert one.ready()
        one.finish(out)
        results.append(out)
    return results


def mean_of(gradients, scheme, exchange, **options):
    """The mean that all ranks find, checked to be the same bits on all of them."""
    results = finish(start(Network(len(gradients)), gradients, scheme, exchange, **options))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert one.tobytes() == two.tobytes()
    return results[0]


def randn(ranks, counts, seed=0):
    rng = np.random.default_rng(seed)
    return [[rng.standard_normal(count).astype(np.float32) for count in counts] for _ in range(ranks)]
