"""Try other tiles for the Triton kernels, one constant at a time.

``python -m benchmarks.tiles --device cuda`` times each kernel with what
``normlib/backends/triton.py`` chooses, and with every constant of
``ALTERNATIVES`` changed alone. It needs what ``benchmarks.speed`` needs.
"""

import contextlib
import functools
import itertools
import math
import statistics
import sys
import time

import torch

import normlib
from benchmarks import speed
from benchmarks.provenance import asked, options, provenance, record_in
from benchmarks.speed import AFFINE, Row, groups
from normlib import backends

ALTERNATIVES = {
    "EACH": (8, 32),
    "STAGES": (1, 2, 4),
    "FEW": (2**10, 2**12),
    "PROGRAMS": (1, 4),
    "SPLITS": (2, 8),
    "WIDE": (2**12, 2**14),
    "LONG_BLOCK": (2**12, 2**14),
    "SHARED": (2**15, 2**17),
}
"""What each constant may be instead, in the order of what it may gain."""

ROWS = [
    Row("RMSNorm", (16384, 8192), "a language model"),
    Row("LayerNorm", (8192, 1024), "a language model"),
    Row("BatchNorm2d", (256, 64, 56, 56), "large"),
    Row("GroupNorm", (64, 256, 28, 28), "ResNet", groups(32)),
    Row("BatchNorm2d", (256, 64, 56, 56), "channels last", last=True),
    Row("RMSNorm", (2048, 16384), "wide"),
    Row("LayerNorm", (2048, 16384), "wide"),
    Row("LayerNorm", (16384, 8192), "a language model"),
    Row("RMSNorm", (4096, 4096), "a language model"),
    Row("LayerNorm", (256, 100_000), "rows longer than a tile"),
    Row("GroupNorm", (4, 512, 128, 128), "rows too long", groups(32)),
    Row("InstanceNorm2d", (32, 64, 112, 112), "style transfer", AFFINE),
    Row("BatchNorm2d", (256, 512, 7, 7), "49 positions"),
]
"""A few of those that ``benchmarks.speed`` measures, the most telling first:
what a budget cuts off is at the end."""

QUICK = [
    Row("RMSNorm", (4, 24), "rows"),
    Row("BatchNorm1d", (6, 4), "columns"),
]


@contextlib.contextmanager
def chosen(settings):
    """Give constants of the backend other values inside a ``with`` block."""
    module = backends.triton
    before = {name: getattr(module, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def launches(run, settings):
    """What a call would launch; nothing is run."""
    found = []

    def note(kernel, grid, *args, **constants):
        found.append((kernel, grid, *constants.items()))

    with chosen({**settings, "_launch": note}):
        run()
    return found


def different(run):
    """The settings that change what a call launches, by their names."""
    usual = launches(run, {})
    each = ((n, v) for n, values in ALTERNATIVES.items() for v in values)
    found = {"as it is": {}}
    for name, value in each:
        if launches(run, {name: value}) != usual:
            found[f"{name}={value}"] = {name: value}
    return found


def measure(row, dtype, device, budget):
    """Both passes, and the forward alone, under each setting."""
    x, dy = speed.data(row, dtype, device)
    call = speed.Call(row, normlib, x, dy, "triton")

    def under(settings, run, times=1):
        with chosen(settings):
            return run(times)

    lines = []
    exact = speed.Call(row, torch.nn, x, dy).both()
    for name, run in (("forward", call.forward), ("both", call.both)):
        runs, failed = {}, {}
        for title, changed in different(run).items():
            one = functools.partial(under, changed, run)
            # What a kernel leaves out must not be there from the last one.
            traps = [torch.full_like(t, torch.nan) for t in exact]
            del traps
            try:
                found = one()
            except Exception as reason:  # too much shared memory, say
                failed[title] = f"{type(reason).__name__}: {reason}"[:200]
                if device == "cuda":
                    torch.cuda.synchronize()  # a GPU in disorder ends it here
            else:
                check(title, found, exact, dtype)
                runs[title] = one
        samples = speed.interleaved(runs, device, budget)
        usual = samples["as it is"]
        lines.append(
            {
                "title": row.title,
                "dtype": speed.short(dtype),
                "pass": name,
                "samples": len(usual),
                "failed": failed,
                "results": {
                    title: {
                        "ms": round(statistics.median(told) * 1e3, 5),
                        "gain": round(gain(usual, told), 4),
                    }
                    for title, told in samples.items()
                },
            }
        )
    return lines


def check(title, found, exact, dtype):
    """See that the numbers are torch.nn's, but for rounding."""
    found = (found,) if isinstance(found, torch.Tensor) else found
    for got, wanted in zip(found, exact, strict=False):
        error = (got - wanted).abs().max() / wanted.abs().max()
        if not error <= 8 * speed.ROUNDING[dtype]:
            sys.exit(f"normlib: {title} gives other numbers, by {error:.1e}")


def gain(usual, told):
    """How many times as fast, pair by pair; the median."""
    pairs = zip(usual, told, strict=True)
    return statistics.median(a / b for a, b in pairs)


def summary(lines):
    """For each setting: in how many lines it counts, mean and worst gain.

    The mean is the geometric one.
    """
    found = {}
    for line in lines:
        for title, result in line["results"].items():
            if title != "as it is":
                found.setdefault(title, []).append(result["gain"])
    return {
        title: {
            "lines": len(gains),
            "mean": round(math.exp(statistics.fmean(map(math.log, gains))), 4),
            "worst": min(gains),
        }
        for title, gains in found.items()
    }


def main():
    """Time row after row; write the record after each, and show it."""
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="a trial")
    parser.add_argument("--only", default="", help="titles that contain it")
    parser.add_argument("--budget", type=float, default=520, help="seconds")
    told = asked(parser)
    start = time.monotonic()
    if "triton" not in backends.available():
        sys.exit("normlib: tiles need a GPU, or Triton's interpreter")
    speed.ready(told.device, "benchmarks.tiles")
    rows = [r for r in (QUICK if told.quick else ROWS) if told.only in r.title]
    if not rows:
        sys.exit(f"normlib: no row's title contains {told.only!r}")
    dtypes = [torch.float32] if told.quick else [torch.bfloat16, torch.float32]
    about = provenance("benchmarks.tiles", told.device, told.commit)
    lines, written = [], None
    for row, dtype in itertools.product(rows, dtypes):
        if time.monotonic() - start > told.budget:
            print(f"normlib: no time for {row.title} {speed.short(dtype)}")
            continue
        found = measure(row, dtype, told.device, 0.2 * (not told.quick))
        for line in found:
            print(line["title"], line["dtype"], line["pass"], flush=True)
            for title, result in line["results"].items():
                number = f"{result['ms']:9.4f} ms {result['gain']:6.3f}"
                print(f"  {title:18}{number}", flush=True)
            for title, reason in line["failed"].items():
                print(f"  {title:18}failed: {reason}", flush=True)
        lines += found
        record = {
            "provenance": about,
            "tiles": lines,
            "summary": summary(lines),
        }
        written = record_in(told.out, record)
    print("normlib: gain of each setting: lines, mean, worst")
    for title, told_of in summary(lines).items():
        print(f"  {title:18}{told_of}")
    print(f"normlib: recorded in {written}")


if __name__ == "__main__":
    main()
