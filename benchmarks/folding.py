"""Measure what a residual network gains when its batch norm is folded.

``python -m benchmarks.folding --device cuda`` from the root of a checkout
needs torch and numpy, and takes about two minutes. Outputs are compared first.
The protocol is in benchmarks/README.md.
"""

import statistics
from typing import NamedTuple

import torch
from torch import nn

import normlib
from benchmarks import speed
from benchmarks.provenance import asked, options, provenance, record_in
from normlib import models
from normlib.folding import fold_batch_norm, plan_folding
from normlib.testing import assert_close


class Network(NamedTuple):
    """A residual network and the image that it is given."""

    title: str
    widths: tuple[int, ...]
    blocks: int
    side: int

    def build(self, norm):
        """The network in evaluation mode, its running statistics lived in."""
        model = models.resnet([*self.widths], self.blocks, norm=norm)
        for _ in range(3):
            model(self.draw(8))
        return model.eval()

    def draw(self, batch):
        """(batch, 3, side, side), always the same values."""
        g = torch.Generator().manual_seed(0)
        return torch.randn(batch, 3, self.side, self.side, generator=g)


NETWORKS = [
    Network("ResNet-20, 32 x 32", (16, 32, 64), 3, 32),
    Network("ResNet-18's widths, 32 x 32", (64, 128, 256, 512), 2, 32),
]
QUICK = [Network("a trial", (4, 6), 1, 8)]
BATCHES = (1, 32)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-2}
"""Largest difference of the scores, as a share of the largest. Convolutions
in float32 keep 10 bits of their factors on a GPU (TF32)."""


def networks(network, device, dtype=torch.float32):
    """The network with torch.nn's batch norm, with normlib's, and folded."""
    theirs = network.build(nn.BatchNorm2d)
    ours = network.build(normlib.BatchNorm2d)
    ours.load_state_dict(theirs.state_dict())
    theirs, ours = (m.to(device, dtype) for m in (theirs, ours))
    return {"torch": theirs, "normlib": ours, "folded": fold_batch_norm(ours)}


@torch.no_grad()
def validate(network, device):
    """The largest difference from torch.nn's scores, in both dtypes.

    Raises:
        ValueError: a batch norm is left.
        AssertionError: a difference is beyond :data:`TOLERANCE`.
    """
    found = {}
    for dtype, tolerance in TOLERANCE.items():
        each = networks(network, device, dtype)
        plan = plan_folding(each["normlib"])
        if plan.left or not plan.folded:
            raise ValueError(f"{network.title}: {plan}")
        x = network.draw(8).to(device, dtype)
        y = {name: model(x) for name, model in each.items()}
        found[speed.short(dtype)] = max(
            assert_close(y[name], y["torch"], tolerance=tolerance, floor=0)
            for name in ("normlib", "folded")
        )
    return found


def measure(network, batch, device, budget):
    """The line of the record for a network and a batch: one forward pass."""
    each = networks(network, device)
    x = network.draw(batch).to(device)

    def runs(model):
        @torch.no_grad()
        def run(times):
            for _ in range(times):
                model(x)

        return run

    calls = {name: runs(model) for name, model in each.items()}
    samples = speed.interleaved(calls, device, budget)
    results = {}
    for name, told in samples.items():
        pairs = zip(samples["torch"], told, strict=True)
        results[name] = {
            "ms": [round(s * 1e3, 5) for s in speed.percentiles(told)],
            "ratio": round(statistics.median(t / s for t, s in pairs), 4),
        }
    return {
        "title": network.title,
        "widths": list(network.widths),
        "blocks": network.blocks,
        "shape": list(x.shape),
        "dtype": speed.short(x.dtype),
        "parameters": sum(p.numel() for p in each["torch"].parameters()),
        "batch_norms": len(plan_folding(each["normlib"]).folded),
        "samples": len(samples["torch"]),
        "results": results,
    }


def shown(line):
    """A line of the table."""
    told = line["results"]
    times = "".join(f"{told[name]['ms'][1]:11.3f}" for name in NAMES)
    return (
        f"{line['title']:30}{line['shape'][0]:6}{times}"
        f"{told['folded']['ratio']:10.2f}"
    )


NAMES = ("torch", "normlib", "folded")
HEAD = (
    f"{'network':30}{'batch':>6}"
    + "".join(f"{name + ' ms':>11}" for name in NAMES)
    + f"{'speed-up':>10}"
)


def main():
    """Compare, time; write the record and show it."""
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="a trial")
    told = asked(parser)
    device = told.device
    speed.ready(device, "benchmarks.folding")
    rows = QUICK if told.quick else NETWORKS
    budget = 0.0 if told.quick else 10.0
    about = provenance("benchmarks.folding", device, told.commit)
    checks = {network.title: validate(network, device) for network in rows}
    print(f"normlib: outputs agree: {checks}\n{HEAD}", flush=True)
    lines = []
    for network in rows:
        for batch in BATCHES:
            line = measure(network, batch, device, budget)
            lines.append({**line, "difference": checks[network.title]})
            print(shown(line), flush=True)
    record = {
        "provenance": about,
        "allocator": speed.allocator(),
        "folding": lines,
    }
    written = record_in(told.out, record)
    print(f"normlib: recorded in {written}")


if __name__ == "__main__":
    main()
