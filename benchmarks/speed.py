"""Measure every layer against torch.nn: validate first, then time.

``python -m benchmarks.speed --device cuda`` from the root of a checkout needs
torch and numpy, and takes some minutes. The protocol is in
benchmarks/README.md.
"""

import contextlib
import functools
import importlib.util
import itertools
import math
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

PINNED = {
    # Blocks of 32 MiB or more are mapped afresh by glibc, and their page
    # faults take longer than the arithmetic: 0.3 ms a MiB.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "KINETO_LOG_LEVEL": "99",  # the profiler, which measures the memory
}

import numpy  # noqa: E402
import torch  # noqa: E402

import normlib  # noqa: E402
from benchmarks.provenance import (  # noqa: E402
    asked,
    options,
    provenance,
    record_in,
)
from normlib import axes, backends, reference  # noqa: E402

MILLION = 2**20

VISITS = {"cpu": 3, "cuda": 1}
"""How often each row is measured: once with all the others, and again. What a
machine shared with others does to one visit it hardly does to all."""


class Row(NamedTuple):
    """A layer on a shape, and why this one."""

    layer: str
    shape: tuple[int, ...]
    why: str
    options: tuple = ()
    """Arguments of the constructor after the size, as pairs."""
    last: bool = False
    """Whether x has its channels last."""
    training: bool = True
    compiled: bool = False
    """Whether torch.compile of the formula is timed beside it, on a GPU."""
    beside: str | None = None
    """What is fused with it: ``"add"``, ``"relu"`` or ``"silu"``."""

    @property
    def norm(self):
        """The row of :data:`normlib.axes.TABLE`."""
        return {
            "BatchNorm1d": "batch_norm",
            "BatchNorm2d": "batch_norm",
            "InstanceNorm2d": "instance_norm",
            "GroupNorm": "group_norm",
            "LayerNorm": "layer_norm",
            "RMSNorm": "rms_norm",
        }[self.layer]

    @property
    def name(self):
        """The layer and its neighbor."""
        if self.beside == "add":
            return f"Add{self.layer}"
        behind = {"relu": "+ReLU", "silu": "+SiLU"}
        return self.layer + behind.get(self.beside, "")

    @property
    def elements(self):
        """How many values x has."""
        return math.prod(self.shape)

    @property
    def view(self):
        """How the layer sees x, as (N, G, K, M)."""
        if self.norm in ("layer_norm", "rms_norm"):
            return axes.trailing_view(self.shape, self.shape[-1:])
        groups = dict(self.options).get("num_groups")
        return axes.channel_view(self.shape, groups)

    @property
    def title(self):
        """The layer, its options and the shape, in few characters."""
        options = [f"{v}" if k == "num_groups" else k for k, v in self.options]
        options += ["last"] * self.last + ["eval"] * (not self.training)
        shape = "x".join(map(str, self.shape))
        return " ".join([self.name, *options, shape])

    def build(self, library, dtype, device):
        """The layer of torch.nn or of normlib, its parameters not ones."""
        options = dict(self.options)
        if self.norm in ("layer_norm", "rms_norm"):
            size = (self.shape[-1],)
        elif self.layer == "GroupNorm":
            size = (options.pop("num_groups"), self.shape[1])
        else:
            size = (self.shape[1],)
        layer = self._with_neighbor(library, *size, **options)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.uniform_(0.5, 1.5, generator=g)
        return layer.to(device=device, dtype=dtype).train(self.training)

    def _with_neighbor(self, library, *size, **options):
        ours = library is normlib
        if self.beside == "add" and ours:
            return getattr(normlib, self.name)(*size, **options)
        norm = getattr(library, self.layer)(*size, **options)
        if self.beside == "add":
            return AddThenNorm(norm)
        if self.beside is None:
            return norm
        act = {"relu": torch.nn.ReLU, "silu": torch.nn.SiLU}[self.beside]()
        pair = normlib.NormActivation if ours else torch.nn.Sequential
        return pair(norm, act)

    def passes(self, backward):
        """Passes over memory that cannot be avoided, each of one tensor.

        Batch norm in training reads x for the statistics and again for y;
        its backward reads x and dy twice. The others find what they read
        again in the cache. A residual is read, and the sum written; its
        gradient is read. An activation need not move anything.
        """
        forward, back = (3, 5) if self._reads_twice else (2, 3)
        if self.beside == "add":
            forward, back = forward + 2, back + 1
        return forward + back * backward

    @property
    def _reads_twice(self):
        return self.norm == "batch_norm" and self.training


class AddThenNorm(torch.nn.Module):
    """A residual addition and a norm, one after the other."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, residual):
        """Return the norm of the sum, and the sum."""
        total = x + residual
        return self.norm(total), total


AFFINE = (("affine", True),)
PLAIN = (("elementwise_affine", False),)


def groups(count):
    """The options of a group norm."""
    return (("num_groups", count),)


ROWS = [
    Row("BatchNorm2d", (32, 64, 56, 56), "ResNet, first stage"),
    Row("BatchNorm2d", (64, 256, 28, 28), "beyond the last cache"),
    Row("BatchNorm2d", (128, 512, 7, 7), "ResNet, last stage: 49 positions"),
    Row("BatchNorm2d", (8, 32, 256, 256), "few large images"),
    Row("BatchNorm2d", (512, 512, 2, 2), "hardly any positions"),
    Row("BatchNorm2d", (64, 16, 8, 8), "a small network on digits"),
    Row("BatchNorm2d", (32, 64, 56, 56), "channels last", last=True),
    Row("BatchNorm2d", (16, 3, 224, 224), "images, channels last", last=True),
    Row("BatchNorm2d", (32, 64, 56, 56), "inference", training=False),
    Row("BatchNorm1d", (8192, 1024), "a wide dense layer"),
    Row("BatchNorm1d", (64, 100), "a small dense layer"),
    Row("BatchNorm1d", (131072, 4), "few features"),
    Row("BatchNorm1d", (32, 128, 1024), "a signal"),
    Row("InstanceNorm2d", (8, 16, 8, 8), "a small network", AFFINE),
    Row("InstanceNorm2d", (32, 64, 56, 56), "as BatchNorm", AFFINE),
    Row("InstanceNorm2d", (32, 64, 56, 56), "the default, no weight"),
    Row("InstanceNorm2d", (4, 64, 256, 256), "style transfer", AFFINE),
    Row("InstanceNorm2d", (64, 256, 14, 14), "short rows", AFFINE),
    Row("InstanceNorm2d", (32, 64, 56, 56), "channels last", AFFINE, True),
    Row("GroupNorm", (32, 64, 56, 56), "as BatchNorm", groups(32)),
    Row("GroupNorm", (16, 256, 32, 32), "diffusion U-Net", groups(32)),
    Row("GroupNorm", (32, 64, 56, 56), "channels last", groups(32), True),
    Row("GroupNorm", (64, 256, 14, 14), "wide groups", groups(8), True),
    Row("LayerNorm", (8192, 1024), "a transformer's tokens"),
    Row("LayerNorm", (16, 128), "one small batch of tokens"),
    Row("LayerNorm", (4096, 768), "no affine, BERT's width", PLAIN),
    Row("LayerNorm", (8192, 1024), "no affine", PLAIN),
    Row("LayerNorm", (65536, 64), "no affine, one head", PLAIN),
    Row("RMSNorm", (4096, 768), "BERT's width"),
    Row("RMSNorm", (8192, 1024), "a transformer's tokens"),
    Row("RMSNorm", (2048, 4096), "LLaMA's width"),
    Row("RMSNorm", (65536, 64), "queries and keys, one head"),
    Row("RMSNorm", (1, 512), "one token"),
]
LANGUAGE = [(2048, 768), (8192, 1024), (4096, 4096), (16384, 8192)]
"""Tokens by hidden units."""

GPU_ROWS = [
    *(
        Row(layer, shape, "a language model", compiled=shape[1] > 768)
        for layer in ("LayerNorm", "RMSNorm")
        for shape in (*LANGUAGE, (2048, 16384))
    ),
    Row("LayerNorm", (256, 100_000), "rows longer than a tile"),
    Row("RMSNorm", (131072, 128), "queries and keys"),
    Row("LayerNorm", (16, 128), "one small batch of tokens"),
    Row("BatchNorm2d", (8, 32, 112, 112), "a first stage"),
    Row("BatchNorm2d", (64, 256, 28, 28), "as on the CPU"),
    Row("BatchNorm2d", (256, 64, 56, 56), "large", compiled=True),
    Row("BatchNorm2d", (256, 512, 7, 7), "a last stage, 49 positions"),
    Row("BatchNorm2d", (64, 16, 8, 8), "a small network on digits"),
    Row("BatchNorm2d", (256, 64, 56, 56), "channels last", last=True),
    Row("BatchNorm2d", (256, 512, 7, 7), "channels last", last=True),
    Row("BatchNorm2d", (256, 64, 56, 56), "inference", training=False),
    Row("BatchNorm1d", (16384, 4096), "a wide dense layer"),
    Row("InstanceNorm2d", (32, 64, 112, 112), "style transfer", AFFINE),
    Row("InstanceNorm2d", (64, 256, 14, 14), "short rows", AFFINE),
    Row("InstanceNorm2d", (32, 64, 56, 56), "last", AFFINE, last=True),
    Row("GroupNorm", (16, 320, 64, 64), "diffusion U-Net", groups(32)),
    Row("GroupNorm", (4, 512, 128, 128), "rows too long", groups(32)),
    Row("GroupNorm", (64, 256, 28, 28), "ResNet", groups(32), compiled=True),
    Row("GroupNorm", (64, 256, 28, 28), "last", groups(32), last=True),
    *(
        Row("RMSNorm", shape, "residual stream", beside="add", compiled=big)
        for shape, big in zip(
            LANGUAGE, (False, False, True, True), strict=True
        )
    ),
    Row("LayerNorm", (8192, 1024), "residual stream", beside="add"),
    Row("LayerNorm", (16384, 8192), "residual stream", beside="add"),
    Row(
        *("GroupNorm", (16, 320, 64, 64), "diffusion U-Net", groups(32)),
        beside="silu",
        compiled=True,
    ),
    Row(
        *("GroupNorm", (4, 512, 128, 128), "rows too long", groups(32)),
        beside="silu",
    ),
    Row("BatchNorm2d", (256, 64, 56, 56), "ResNet", beside="relu"),
    Row("BatchNorm2d", (256, 64, 56, 56), "last", last=True, beside="relu"),
]
"""What is measured on a GPU: more of everything, and what it is used for."""

QUICK = [
    Row("BatchNorm2d", (4, 6, 5, 5), "a backend and torch.nn both serve"),
    Row("GroupNorm", (2, 6, 4, 4), "channels last", groups(3), True),
    Row("RMSNorm", (3, 8), "no mean, no bias"),
    Row("RMSNorm", (3, 8), "with a residual", beside="add"),
    Row("GroupNorm", (2, 6, 4, 4), "a kink", groups(3), beside="relu"),
]
MEANS = (0.0, 100.0, 1e4)
"""Of the values in the validation, whose standard deviation is 1."""

SMALL = {"cpu": 2**22, "cuda": 2**20}
"""Values at most in the validation: float64 in NumPy is slow."""

ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}
"""Errors that rounding makes, about ten times a unit in the last place of
float32 and one of the 16-bit types."""


class Call:
    """One layer on one input, ready to be run: forward, or both passes."""

    def __init__(self, row, library, x, dy, backend=None):
        self.layer = row.build(library, x.dtype, x.device)
        self.norm = next(m for m in self.layer.modules() if hasattr(m, "eps"))
        self.x, self.backend = x, backend
        self.inputs, self.upstream = (x,), (dy,)
        if row.beside == "add":
            self.inputs, self.upstream = (
                (x, x.detach().flip(0)),
                (dy, dy.flip(0)),
            )
        self.leaves = [x, *self.layer.parameters()]

    def forced(self):
        """A context in which the backend is forced, if one is."""
        if self.backend is None:
            return contextlib.nullcontext()
        return backends.use_backend(self.backend)

    def serves(self):
        """Whether the forced backend can do it."""
        try:
            self.forward()
        except RuntimeError as error:
            if "does not serve" not in str(error):
                raise
            return False
        return True

    def forward(self, times=1):
        """Run the layer, without a graph."""
        with torch.no_grad(), self.forced():
            for _ in range(times):
                y = self.layer(*self.inputs)
        return y

    def both(self, times=1):
        """Run the layer and its backward."""
        with self.forced():
            for _ in range(times):
                out = self.layer(*self.inputs)
                grads = torch.autograd.grad(out, self.leaves, self.upstream)
        return out[0] if isinstance(out, tuple) else out, *grads

    @property
    def eps(self):
        """The norm's; where it has none, that of the arithmetic."""
        wide = torch.float32 if self.x.element_size() == 2 else self.x.dtype
        least = torch.finfo(wide).eps
        return least if self.norm.eps is None else self.norm.eps


class Compiled(Call):
    """torch.compile's kernel of the plain formula; no running statistics."""

    def __init__(self, row, x, dy):
        super().__init__(row, normlib, x, dy)
        kind = axes.TABLE[row.norm]
        view = row._replace(shape=tuple(x.shape)).view
        weight, bias = self.norm.weight, getattr(self.norm, "bias", None)
        eps = self.eps

        def formula(weight, bias, x, residual=None):
            total = x if residual is None else x + residual
            y = backends.eager.normalize(
                *(total, view, weight, bias, eps),
                over_batch=kind.over_batch,
                centered=kind.centered,
            )[0]
            if residual is not None:
                return y, total
            return backends.eager.activate(y, row.beside)

        compiled = torch.compile(formula, dynamic=False)
        self.layer = lambda *inputs: compiled(weight, bias, *inputs)


class Liger(Call):
    """Liger-Kernel's kernel, where it has one, all in float32 inside."""

    def __init__(self, row, x, dy):
        super().__init__(row, torch.nn, x, dy)
        f, eps = liger(), self.eps
        weight, bias = self.norm.weight, getattr(self.norm, "bias", None)
        channels = x.shape[1], dict(row.options).get("num_groups")
        rms = {"casting_mode": "gemma", "in_place": False}  # dy is not its own
        self.layer = {
            "LayerNorm": lambda x: f.liger_layer_norm(x, weight, bias, eps),
            "RMSNorm": lambda x: f.liger_rms_norm(x, weight, eps, **rms),
            "AddRMSNorm": lambda x, residual: f.liger_fused_add_rms_norm(
                x, residual, weight, eps, **rms
            ),
            "GroupNorm": lambda x: f.liger_group_norm(
                x, weight, bias, *channels, eps
            ),
        }[row.name]

    @staticmethod
    def serves_row(row):
        """Whether it has a kernel for the row: affine, channels not last."""
        names = ("LayerNorm", "RMSNorm", "AddRMSNorm", "GroupNorm")
        plain = row.last or row.options == PLAIN
        return row.name in names and not plain and liger() is not None


@functools.cache
def liger():
    """The functions of Liger-Kernel, or None where it cannot be imported."""
    try:
        from liger_kernel.transformers import functional
    except Exception as reason:
        print(f"normlib: without Liger-Kernel: {reason}")
        return None
    return functional


def data(row, dtype, device, mean=0.0, limit=math.inf):
    """x, which requires a gradient, and dy; at most ``limit`` values."""
    first = max(2, int(row.shape[0] * min(1, limit / row.elements)))
    shape = (min(row.shape[0], first), *row.shape[1:])
    g = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=g, device=device)
    x, dy = (t.to(dtype) for t in (draw(shape) + mean, draw(shape)))
    if row.last:
        x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))
    return x.requires_grad_(), dy


def calls(row, x, dy, compiled=False):
    """torch.nn's layer, normlib's, normlib's by each backend, compiled."""
    found = {
        "torch": Call(row, torch.nn, x, dy),
        "normlib": Call(row, normlib, x, dy),
    }
    for name in backends.available():
        call = Call(row, normlib, x, dy, name)
        if call.serves():
            found[name] = call
    if x.is_cuda and Liger.serves_row(row):
        found |= tried("liger", Liger, row, x, dy)
    if compiled and row.compiled and x.is_cuda and x.dtype == torch.bfloat16:
        found |= tried("compiled", Compiled, row, x, dy)
    return found


def tried(name, kind, row, x, dy):
    """A call of another project by its name; none where it fails."""
    try:
        call = kind(row, x, dy)
        call.both()
    except Exception as reason:
        told = str(reason).strip().splitlines() or [""]
        print(f"normlib: {row.title} not by {name}: {told[0]:.200}")
        return {}
    return {name: call}


# Test


ROOT = pathlib.Path(__file__).parents[1]
PATIENCE = 240
"""Seconds for the tests, so that the rest of ten minutes is the table's."""


def tested():
    """Run the tests of a GPU; return the last line of what they say."""
    if importlib.util.find_spec("pytest") is None:
        return "not run: pytest is not installed"
    spread = importlib.util.find_spec("xdist") is not None
    files = [
        path
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if "from devices import" in path.read_text("utf-8")
    ]
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-m", "gpu"),
        *("-o", "addopts=", "-W", "default", "-p", "no:benchmark"),
        *(["-n", "8"] if spread else []),
        *map(str, files),
    ]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"broken off after {PATIENCE} s"
    said = done.stdout.strip().splitlines()
    print("\n".join(said[-20:]), flush=True)
    return said[-1] if said else done.stderr.strip()[-200:]


# Validate


def validate(row, dtype, device):
    """The errors against float64, as a share of the largest value (or 1).

    Returns:
        A dictionary for each mean: of torch.nn, of normlib and of each
        backend, the errors of y, dx, dweight and dbias.

    Raises:
        ValueError: an error is beyond any rounding.
    """
    means = MEANS if dtype == torch.float32 and row.training else (0.0,)
    found = []
    for mean in means:
        x, dy = data(row, dtype, device, mean, SMALL[device])
        dy = off_the_kink(row, x, dy)
        each = calls(row, x, dy)
        exact = exactly(row, each["torch"])
        names = ("y", "dx", "dweight", "dbias")
        errors = {
            name: dict(
                zip(names, map(error, call.both(), exact), strict=False)
            )
            for name, call in each.items()
        }
        for name, told in errors.items():
            ours = name not in ("torch", "liger")
            if ours and unsound(told, errors["torch"], dtype):
                raise ValueError(
                    f"{row.title} {short(dtype)} by {name}, mean {mean}: "
                    f"errors {told}, torch.nn's {errors['torch']}"
                )
        found.append({"mean": mean, "errors": errors})
    return found


def off_the_kink(row, x, dy):
    """Dy, but 0 where rounding decides on which side of 0 a ReLU is."""
    if row.beside != "relu":
        return dy
    alone = row._replace(beside=None)
    z = exactly(alone, Call(alone, torch.nn, x, dy))[0]
    return dy.masked_fill(torch.from_numpy(abs(z) < 0.05).to(dy.device), 0)


def exactly(row, call):
    """y, dx, dweight and dbias of the reference."""
    # The sum, where there is a residual, is rounded as both libraries hold it.
    parts = sum(call.inputs), *call.upstream
    x, dy, *dtotal = (t.detach().double().cpu().numpy() for t in parts)
    parameters = {
        name: p.detach().double().cpu().numpy()
        for name, p in call.norm.named_parameters()
    }
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if not row.training:  # by statistics that are 0 and 1
        scale = weight.reshape(1, -1, *[1] * (x.ndim - 2))
        xhat = x / math.sqrt(1 + call.eps)
        rest = tuple(i for i in range(x.ndim) if i != 1)
        y = xhat * scale + bias.reshape(scale.shape)
        dx = dy * scale / math.sqrt(1 + call.eps)
        return y, dx, (dy * xhat).sum(rest), dy.sum(rest)
    kind = axes.TABLE[row.norm]
    view = row._replace(shape=x.shape).view
    z, cache = reference.normalize(
        *(x, view, weight, bias, call.eps),
        over_batch=kind.over_batch,
        centered=kind.centered,
    )
    y, dz = activated(row, z, dy)
    dx, *others = reference.normalize_backward(dz, cache)
    return y, sum(dtotal, dx), *others


def activated(row, z, dy):
    """The activation that a row has, and the gradient through it."""
    if row.beside == "relu":
        return numpy.maximum(z, 0), dy * (z > 0)
    if row.beside == "silu":
        sigmoid = 1 / (1 + numpy.exp(-z))
        return z * sigmoid, dy * sigmoid * (1 + z * (1 - sigmoid))
    return z, dy


def error(got, exact):
    """The largest difference, as a share of the largest value (or of 1)."""
    got = got.detach().double().cpu().numpy().reshape(exact.shape)
    return float(
        numpy.abs(got - exact).max() / max(1.0, numpy.abs(exact).max())
    )


def unsound(ours, torchs, dtype):
    """Whether an error is one of the method: NaN, or far beyond torch's."""
    return any(
        not told <= 100 * max(torchs[name], ROUNDING[dtype])
        for name, told in ours.items()
    )


# Time


def timed(call, times, device):
    """Seconds a run, of ``times`` runs."""
    if device == "cpu":
        start = time.perf_counter()
        call(times)
        return (time.perf_counter() - start) / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    # Empties the second-level cache, and keeps the GPU busy while the calls
    # are queued: what is measured is the GPU's time, not Python's.
    FLUSH[0].zero_()
    begin.record()
    call(times)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


FLUSH: list[torch.Tensor] = []


def interleaved(each: dict[str, Callable], device, budget):
    """Samples of each in turn, so that what disturbs one disturbs all.

    The order is drawn anew in each round: what one leaves in the caches and
    with the allocator meets another one each time.
    """
    once = {}
    for name, call in each.items():
        call(2)
        once[name] = timed(call, 1, device)
    times = {
        name: max(1, int(2e-4 / s)) if device == "cpu" else 1
        for name, s in once.items()
    }
    round_ = sum(once[name] * times[name] for name in each)
    samples = {name: [] for name in each}
    names, order = list(each), random.Random(0)
    for _ in range(min(200, max(15, int(budget / round_)))):
        order.shuffle(names)
        for name in names:
            samples[name].append(timed(each[name], times[name], device))
    return samples


def peak(call, device):
    """Bytes that both passes hold at most, beyond what is there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call.both()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    call.both()
    return traced_peak(call.both)


def traced_peak(function):
    """The same on the CPU, from the profiler's list of allocations."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    events = profile.kineto_results.events()
    events = [e for e in events if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    held = most = 0
    for event in events:
        held += event.nbytes()
        most = max(most, held)
    return most


def copy_speed(device, size=2**26):
    """Bytes a second of a copy, reading and writing counted."""
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)

    def copy(times):
        for _ in range(times):
            target.copy_(source)

    copy(2)
    best = statistics.median(timed(copy, 1, device) for _ in range(15))
    return 2 * source.nbytes / best


class Measured(NamedTuple):
    """What is measured of a row in one dtype, by name; of each pass."""

    samples: dict[bool, dict[str, list[float]]]
    """Seconds a call, of the forward alone (False) and of both passes."""
    memory: dict[str, int]
    wall: dict[bool, dict[str, float]]
    """Seconds of wall-clock a call, of some in a row, on a GPU."""


def measure(row, dtype, device, budget, memory=None):
    """One visit to a row; another one knows the memory already."""
    x, dy = data(row, dtype, device)
    each = calls(row, x, dy, compiled=True)
    if memory is None:
        memory = {name: peak(call, device) for name, call in each.items()}
    samples, wall = {}, {}
    for backward in (False, True):
        runs = {
            name: call.both if backward else call.forward
            for name, call in each.items()
        }
        samples[backward] = interleaved(runs, device, budget)
        wall[backward] = {}
        if device == "cuda":
            for name, told in samples[backward].items():
                times = 20 if statistics.median(told) < 5e-4 else 5
                wall[backward][name] = in_a_row(runs[name], times)
    return Measured(samples, memory, wall)


def lines_of(row, dtype, visits, copy):
    """The lines of the record for a row: forward, then both passes."""
    lines = []
    for backward in (False, True):
        samples = {
            name: [s for v in visits for s in v.samples[backward][name]]
            for name in visits[0].samples[backward]
        }
        nbytes = row.passes(backward) * row.elements * dtype.itemsize
        results = {}
        for name, told in samples.items():
            low, middle, high = percentiles(told)
            pairs = zip(samples["torch"], told, strict=True)
            results[name] = {
                "ms": [round(s * 1e3, 5) for s in (low, middle, high)],
                "gbs": round(nbytes / middle / 1e9, 2),
                "share": round(nbytes / middle / copy, 4),
                "ratio": round(statistics.median(t / s for t, s in pairs), 4),
            }
            if name in visits[0].wall[backward]:
                wall = min(v.wall[backward][name] for v in visits)
                results[name]["wall"] = round(wall * 1e3, 5)
        memory = visits[0].memory if backward else None
        lines.append(
            {
                "layer": row.name,
                "title": row.title,
                "why": row.why,
                "shape": list(row.shape),
                "options": dict(row.options),
                "channels_last": row.last,
                "training": row.training,
                "dtype": short(dtype),
                "pass": "both" if backward else "forward",
                "elements": row.elements,
                "samples": len(samples["torch"]),
                "results": results,
                "memory": memory,
            }
        )
    return lines


def in_a_row(call, times):
    """Seconds of wall-clock a call, of some in a row: Python's work, too."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call(times)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def percentiles(samples):
    """The 20th, 50th and 80th percentile."""
    return [float(numpy.percentile(samples, p)) for p in (20, 50, 80)]


# Judge


def judge(lines, checks, device="cpu"):
    """A line for each goal: whether it is met, by which number, where."""
    if device == "cuda":
        return judge_gpu(lines, checks)
    large = [
        t
        for t in lines
        if t["pass"] == "both"
        and t["dtype"] == "float32"
        and t["elements"] >= MILLION
        and t["training"]
    ]

    def of(layer, **wanted):
        return [
            t
            for t in large
            if t["layer"].startswith(layer)
            and all(t[k] == v for k, v in wanted.items())
        ]

    images = [t for t in of("BatchNorm") if len(t["shape"]) > 2]
    images = [t for t in images if not t["channels_last"]]
    plain = {"elementwise_affine": False}
    slow = [t for t in lines if t["results"]["torch"]["ms"][1] >= 0.1]
    fast = [t for t in lines if t["results"]["torch"]["ms"][1] < 0.1]
    return [
        ratio("BatchNorm over positions, both passes", images, 1.5),
        ratio("InstanceNorm, both passes", of("InstanceNorm"), 1.6),
        ratio("RMSNorm, both passes", of("RMSNorm"), 2.0),
        ratio(
            "LayerNorm without affine, both passes",
            of("LayerNorm", options=plain),
            1.3,
        ),
        ratio("nowhere slower, from 0.1 ms on", slow, 0.95),
        most("microseconds more, below 0.1 ms", fast, extra, 5.0),
        most(
            "memory, as a share of torch.nn's",
            [t for t in lines if t["memory"]],
            lambda t: t["memory"]["normlib"] / t["memory"]["torch"],
            1.01,  # statistics and blocks of a few kilobytes
        ),
        most("error, as a share of torch.nn's", checks, worst, 1.02),
    ]


SMALL_BYTES, LARGE_BYTES = 2**20, 2**26


def judge_gpu(lines, checks):
    """The goals of a GPU: as fast as its memory, and never behind."""
    width = {"float32": 4, "bfloat16": 2, "float16": 2}

    def nbytes(line):
        return line["elements"] * width[line["dtype"]]

    large = [t for t in lines if nbytes(t) >= LARGE_BYTES]
    small = [t for t in lines if nbytes(t) < SMALL_BYTES]
    rest = [t for t in lines if nbytes(t) >= SMALL_BYTES]
    return [
        least("share of a copy's speed, from 64 MB on", large, share, 0.9),
        # Two runs of the same kernel differ by as much as 2 %.
        least("against the best of the others, from 1 MB", rest, lead, 0.98),
        least("calls in a row, below 1 MB", small, called, 0.95),
        most("error, as a share of torch.nn's", checks, worst, 1.02),
    ]


def share(line):
    """How near normlib comes to the speed of a plain copy."""
    return line["results"]["normlib"]["share"]


def called(line):
    """Torch.nn's time by normlib's of calls in a row, with Python's work."""
    torchs, ours = (line["results"][k]["wall"] for k in ("torch", "normlib"))
    return torchs / ours


def lead(line):
    """The best time of the others by normlib's, each by its ratio."""
    others = ("torch", "compiled", "liger")
    ratios = {name: told["ratio"] for name, told in line["results"].items()}
    return ratios["normlib"] / max(ratios.get(name, 0.0) for name in others)


def goal(name, bound, found, met):
    """What is kept of a goal: found is (number, where), or None."""
    number, where = found or (None, None)
    return {
        "goal": name,
        "bound": bound,
        "number": number if number is None else round(number, 4),
        "where": where,
        "met": met,
    }


def ratio(name, lines, bound):
    """Whether no ratio to torch.nn is under the bound."""
    return least(
        name, lines, lambda t: t["results"]["normlib"]["ratio"], bound
    )


def least(name, lines, number, bound):
    """Whether no number is under the bound."""
    found = [(number(t), where(t)) for t in lines]
    lowest = min(found, default=None)
    return goal(name, bound, lowest, lowest is None or lowest[0] >= bound)


def most(name, lines, number, bound):
    """Whether no number is over the bound."""
    found = [(number(t), where(t)) for t in lines]
    highest = max(found, default=None)
    return goal(name, bound, highest, highest is None or highest[0] <= bound)


def extra(line):
    """Microseconds that normlib takes more than torch.nn."""
    ours, torchs = (
        line["results"][name]["ms"][1] for name in ("normlib", "torch")
    )
    return (ours - torchs) * 1e3


def worst(check):
    """The largest error of normlib's own choice, as a share of torch.nn's.

    What is under a unit in the last place counts as that. Where both are
    under :data:`ROUNDING` the share is divided by 1.5, the factor that is
    allowed there, so that 1 is the bound everywhere.
    """
    rounding = ROUNDING[getattr(torch, check["dtype"])]
    ours, torchs = (check["errors"][name] for name in ("normlib", "torch"))
    shares = []
    for name, told in ours.items():
        pair = [max(e, rounding / 8) for e in (told, torchs[name])]
        allowed = 1.5 if max(pair) < rounding else 1.0
        shares.append(pair[0] / pair[1] / allowed)
    return max(shares)


def where(line):
    """Which line, in few characters."""
    last = line.get("pass", f"mean {line.get('mean', 0):g}")
    return f"{line['title']} {line['dtype']} {last}"


# Show


def short(dtype):
    """The name of a dtype, without its library."""
    return str(dtype).removeprefix("torch.")


HEAD = (
    f"{'layer and shape':38} {'dtype':9} {'pass':8}"
    f"{'torch ms':>10}{'ours ms':>10}{'ratio':>7}{'copy':>6}  backends"
)


def shown(line):
    """A line of the table."""
    ours, torchs = (line["results"][name] for name in ("normlib", "torch"))
    others = "  ".join(
        f"{name} {told['ratio']:.2f}"
        for name, told in line["results"].items()
        if name not in ("torch", "normlib")
    )
    return (
        f"{line['title']:38} {line['dtype']:9} {line['pass']:8}"
        f"{torchs['ms'][1]:10.4f}{ours['ms'][1]:10.4f}{ours['ratio']:7.2f}"
        f"{ours['share']:6.0%}  {others}"
    )


def verdict(told):
    """A goal as a sentence."""
    if told["number"] is None:
        return f"{'none':7} {told['goal']}: nothing measured"
    word = "met" if told["met"] else "MISSED"
    return (
        f"{word:7} {told['goal']}: {told['number']:.3g} "
        f"(goal {told['bound']:g}), {told['where']}"
    )


def ready(device, command="benchmarks.speed"):
    """Hold what empties a GPU's cache; on the CPU pin the allocator."""
    if device == "cuda":
        FLUSH[:] = [torch.empty(2**30, dtype=torch.int8, device=device)]
    else:
        pin(command)


def pin(command):
    """Start again with the allocator pinned, unless it is."""
    if any(os.environ.get(name) != value for name, value in PINNED.items()):
        os.environ.update(PINNED)
        again = [sys.executable, "-m", command, *sys.argv[1:]]
        os.execv(sys.executable, again)


def allocator():
    """Return the settings of the allocator."""
    return {name: os.environ.get(name) for name in PINNED}


def main():
    """Validate, time, judge; write the record and show it."""
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="a trial")
    parser.add_argument("--only", default="", help="titles that contain it")
    told = asked(parser)
    device = told.device
    ready(device)
    rows = GPU_ROWS if device == "cuda" else ROWS
    rows = QUICK if told.quick else rows
    rows = [row for row in rows if told.only in row.title]
    if not rows:
        sys.exit(f"normlib: no row's title contains {told.only!r}")
    dtypes = [torch.float32, torch.bfloat16]
    dtypes += [torch.float16] if device == "cuda" else []
    about = provenance("benchmarks.speed", device, told.commit)
    whole = device == "cuda" and not told.quick and not told.only
    tests = {"tests": tested()} if whole else {}
    copy = copy_speed(device, 2**16 if told.quick else 2**26)
    budget = {"cpu": 1.0, "cuda": 0.4}[device] * (not told.quick)
    checks = []
    for dtype in dtypes:
        print(f"normlib: validating {short(dtype)}", flush=True)
        for row in rows:
            about_row = {"title": row.title, "dtype": short(dtype)}
            for check in validate(row, dtype, device):
                checks.append({**about_row, **check})
    print(f"normlib: a copy moves {copy / 1e9:.1f} GB/s", flush=True)
    visits = {(row, dtype): [] for row in rows for dtype in dtypes}
    found = {}
    turns = 1 if told.quick else VISITS[device]
    for turn in range(1, turns + 1):
        print(f"normlib: visit {turn} of {turns}", flush=True)
        if turn == turns:
            print(HEAD, flush=True)
        for row in rows:
            for dtype in dtypes:
                seen = visits[row, dtype]
                memory = seen[0].memory if seen else None
                seen.append(measure(row, dtype, device, budget, memory))
                found[row, dtype] = lines_of(row, dtype, seen, copy)
                if turn == turns:
                    print(*map(shown, found[row, dtype]), sep="\n", flush=True)
                torch.compiler.reset()
            lines = list(itertools.chain.from_iterable(found.values()))
            titles = {line["title"] for line in lines}
            checked = [c for c in checks if c["title"] in titles]
            left = sorted({row.title for row in rows} - titles)
            record = {
                "provenance": about,
                "allocator": allocator(),
                "copy_gbs": round(copy / 1e9, 2),
                **tests,
                "goals": judge(lines, checked, device),
                "speed": lines,
                "checks": checked,
                **({"missing": left} if left else {}),
            }
            written = record_in(told.out, record)  # little can be lost
    print("\n".join(map(verdict, record["goals"])))
    print(f"normlib: recorded in {written}")


if __name__ == "__main__":
    main()
