"""A worker of an elastic job, which ../test_elastic.py starts.

    elastic.py FOLDER KIND EXCHANGE PLAN

PLAN is a list of events. Each happens in the step ``at``: ``hosts`` is the list of hosts from then on, and
the ranks in ``kill`` die at the moment ``when``: before, in, or after the backward pass, or in the step. Or
training waits until there are ``size`` ranks.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import horovod.torch as hvd
import torch
from plan import follow
from shared import KINDS, make

import hvd_quant.torch as hq

STEPS = 24
ROW = 512


class Model(torch.nn.Module):
    """Has a row for every step, whose gradient is 1 in that step; and noise that differs between ranks."""

    def __init__(self):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.zeros(STEPS, ROW))
        self.noise = torch.nn.Parameter(torch.zeros(4, 1000))

    def forward(self, step):
        own = torch.randn(4, 1000, generator=torch.Generator().manual_seed(100 * step + hvd.rank()))
        return self.rows[step].sum() + (self.noise * own).sum()


def die_if(doomed):
    if doomed:
        os._exit(1)


def main():
    folder, kind, exchange, plan = Path(sys.argv[1]), *sys.argv[2:4], json.loads(sys.argv[4])
    hvd.init()
    torch.manual_seed(0)
    model = Model()
    compressor = make(hq, kind, exchange=exchange, fusion_bytes=0)
    optimizer = hq.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        named_parameters=model.named_parameters(),
        compression=compressor,
    )
    state = hvd.elastic.TorchState(model, optimizer, compressor=compressor, batch=0, event=0, sizes=[])
    sizes = []  # of the job, as this worker has seen them

    @hvd.elastic.run
    def train(state):
        sizes.append(hvd.size())
        while state.batch < STEPS:
            doomed = follow(plan, state, state.batch, hvd, folder)

            optimizer.zero_grad()
            die_if(doomed == "before")
            loss = model(state.batch)
            hook = model.rows.register_hook(lambda _, doomed=doomed: die_if(doomed == "in"))
            loss.backward()
            hook.remove()
            die_if(doomed == "after")
            hvd.allreduce(loss.detach())
            die_if(doomed == "step")
            optimizer.step()
            state.batch += 1
            if state.batch % 2 == 0:
                state.commit()
            choice = compressor._reducer._choice
            if hvd.size() > 1:
                assert choice.size == hvd.size() == len(choice.topology.hosts)

    train(state)
    parameters = b"".join(one.detach().numpy().tobytes() for one in model.parameters())
    digests = hvd.allgather_object(hashlib.sha1(parameters).hexdigest())
    report = {
        "rank": hvd.rank(),
        "sizes": sizes,
        "identical": len(set(digests)) == 1,
        "exact": bool((model.rows == -1).all()),
        "uses": max(compressor.state_dict()["uses"].values()),
        "stats": compressor.stats(),
        "hosts": len(set(compressor._reducer._choice.topology.hosts)),
    }
    (folder / f"report.{hvd.rank()}.json").write_text(json.dumps(report))
    assert kind in KINDS


if __name__ == "__main__":
    main()
