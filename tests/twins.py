"""The layers beside their twins in torch.nn, and every choice of a backend.

One table of layers with their shapes, one of configurations. A fact is a test
over some of these rows, and says of each that ours and torch's are the same.
"""

import functools
import inspect
import re
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch

import normlib
from normlib import backends
from normlib.testing import assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Twin(NamedTuple):
    """A layer by name, how to construct it, and what to feed it."""

    name: str
    args: tuple
    shape: tuple[int, ...]
    config: dict = {}  # noqa: RUF012

    def make(self, library, **kwargs):
        """The layer of normlib or of torch.nn, fresh."""
        return getattr(library, self.name)(*self.args, **self.config, **kwargs)

    def pair(self, **kwargs):
        """Our layer and torch's with the same state, none of it 0 or 1."""
        theirs = self.make(torch.nn, **kwargs)
        with torch.no_grad():
            for i, p in enumerate(theirs.parameters()):
                p.copy_(torch.linspace(-1.5, 2.0 + i, p.numel()).view_as(p))
            if self.tracks:
                size = self.args[0]
                theirs.running_mean.copy_(torch.linspace(0.5, 2.0, size))
                theirs.running_var.copy_(torch.linspace(0.3, 4.0, size))
        ours = self.make(normlib, **kwargs)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        return ours, theirs

    def draw(self, seed=0, dtype=torch.float32, device="cpu", shape=None):
        """An input, or a gradient: the same values in every dtype."""
        g = torch.Generator().manual_seed(seed)
        shape = self.shape if shape is None else shape
        x = torch.randn(shape, generator=g, dtype=torch.float64) * 2 + 1
        return x.to(device, dtype)

    @property
    def tracks(self):
        """Whether there are running statistics."""
        default = self.name.startswith("BatchNorm")
        return self.config.get("track_running_stats", default)

    @property
    def function(self):
        """The name in torch.nn.functional."""
        return re.sub("Norm.*", "_norm", self.name).lower()

    @property
    def single(self):
        """Whether the input is one instance, without a batch axis."""
        ranks = {"InstanceNorm1d": 2, "InstanceNorm2d": 3, "InstanceNorm3d": 4}
        return len(self.shape) == ranks.get(self.name, 1)


FULL = {"affine": True, "track_running_stats": True}

LAYERS = {
    "BatchNorm1d": Twin("BatchNorm1d", (3,), (6, 3)),
    "BatchNorm1d signal": Twin("BatchNorm1d", (3,), (2, 3, 5)),
    "BatchNorm2d": Twin("BatchNorm2d", (3,), (4, 3, 5, 2)),
    "BatchNorm3d": Twin("BatchNorm3d", (3,), (2, 3, 2, 3, 4)),
    "InstanceNorm1d": Twin("InstanceNorm1d", (3,), (2, 3, 5), FULL),
    "InstanceNorm1d single": Twin("InstanceNorm1d", (3,), (3, 5), FULL),
    "InstanceNorm2d": Twin("InstanceNorm2d", (3,), (4, 3, 5, 2), FULL),
    "InstanceNorm2d one": Twin("InstanceNorm2d", (3,), (1, 3, 5, 2), FULL),
    "InstanceNorm2d gray": Twin("InstanceNorm2d", (1,), (4, 1, 5, 2), FULL),
    "InstanceNorm2d single": Twin("InstanceNorm2d", (3,), (3, 5, 2), FULL),
    "InstanceNorm3d": Twin("InstanceNorm3d", (3,), (2, 3, 2, 3, 4), FULL),
    "InstanceNorm3d single": Twin("InstanceNorm3d", (3,), (3, 2, 3, 4), FULL),
    "GroupNorm": Twin("GroupNorm", (2, 6), (3, 6, 5, 2)),
    "GroupNorm dense": Twin("GroupNorm", (2, 6), (5, 6)),  # M = 1
    "GroupNorm signal": Twin("GroupNorm", (3, 6), (2, 6, 5)),
    "GroupNorm one": Twin("GroupNorm", (1, 6), (3, 6, 5, 2)),
    "GroupNorm each": Twin("GroupNorm", (6, 6), (3, 6, 5, 2)),
    "GroupNorm volume": Twin("GroupNorm", (2, 4), (2, 4, 2, 3, 2)),
    "LayerNorm": Twin("LayerNorm", (5,), (2, 3, 5)),
    "LayerNorm dense": Twin("LayerNorm", (5,), (6, 5)),
    "LayerNorm token": Twin("LayerNorm", (5,), (5,)),  # no batch at all
    "LayerNorm image": Twin("LayerNorm", ((3, 5, 2),), (4, 3, 5, 2)),
    "RMSNorm": Twin("RMSNorm", (5,), (2, 3, 5)),
    "RMSNorm dense": Twin("RMSNorm", (5,), (6, 5)),
    "RMSNorm token": Twin("RMSNorm", (5,), (5,)),
    "RMSNorm image": Twin("RMSNorm", ([3, 5, 2],), (4, 3, 5, 2)),
}
"""Each layer with all that it has: parameters, and running statistics."""

EPS, NO_BIAS = {"eps": 0.3}, {"bias": False}
CONFIGS = {
    "BatchNorm1d": {
        "eps": EPS,
        "momentum 1": {"momentum": 1.0},
        "momentum 0": {"momentum": 0.0},
        "cumulative": {"momentum": None},
        "no affine": {"affine": False},
        "no bias": NO_BIAS,
        "no tracking": {"track_running_stats": False},
        "bare": {"affine": False, "track_running_stats": False},
    },
    "InstanceNorm1d": {
        "defaults": {},
        "eps": FULL | EPS,
        "momentum 1": FULL | {"momentum": 1.0},
        "momentum None": FULL | {"momentum": None},
        "affine": {"affine": True},
        "tracking": {"track_running_stats": True},
        "no bias": FULL | NO_BIAS,
    },
    "GroupNorm": {
        "eps": EPS,
        "no affine": {"affine": False},
        "no bias": NO_BIAS,
    },
    "LayerNorm": {
        "eps": EPS,
        "no affine": {"elementwise_affine": False},
        "no bias": NO_BIAS,
        "neither": {"elementwise_affine": False, "bias": False},
    },
    "RMSNorm": {"eps": EPS, "no affine": {"elementwise_affine": False}},
}
"""One layer of each kind in its other configurations."""


def _known(name, config):
    """Whether the installed torch.nn has these arguments."""
    return set(config) <= set(
        inspect.signature(getattr(torch.nn, name)).parameters
    )


TWINS = LAYERS | {
    f"{name} {what}": LAYERS[name]._replace(config=config)
    for name, configs in CONFIGS.items()
    for what, config in configs.items()
    if _known(name, config)
}

NAMES = sorted({twin.name for twin in LAYERS.values()})


def over(table):
    """Parametrize a test over rows of a table of twins."""
    return pytest.mark.parametrize("twin", table.values(), ids=table.keys())


def where(condition, table=LAYERS):
    """The rows of a table that a condition holds for."""
    return {key: twin for key, twin in table.items() if condition(twin)}


EVERYWHERE = "everywhere"
"""The default choice with no call too small for a fast path."""

CHOICES = ["default", EVERYWHERE, *backends.available()]

REFUSAL = "is forced and does not serve"


@contextmanager
def chosen(choice):
    """Choose a backend; yield the list of the fast paths that were taken."""
    fast = {k: m for k, m in backends.BACKENDS.items() if k != "eager"}
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        if choice == EVERYWHERE:
            patch.setattr(backends, "LEAST", 0)
            for module in fast.values():
                patch.setattr(module, "least", lambda *args: 0)
                patch.setattr(module, "pays", module.supports)
        for name, module in fast.items():
            if choice in ("default", EVERYWHERE, name):
                for step in ("forward", "backward"):
                    if hasattr(module, step):
                        counted = _counted(getattr(module, step), step, taken)
                        patch.setattr(module, step, counted)
        if choice in ("default", EVERYWHERE):
            yield taken
        else:
            with backends.use_backend(choice):
                yield taken


def _counted(function, step, taken):
    @functools.wraps(function)
    def call(*args, **kwargs):
        taken.append(step)
        return function(*args, **kwargs)

    return call


def with_backends(*choices):
    """Run a test with each choice of a backend.

    A fast backend that is forced may refuse what it does not serve, and in no
    other way than by saying so; that the rest is served is a test of its own.
    """

    def decorate(test):
        @pytest.mark.parametrize("choice", choices or CHOICES)
        @functools.wraps(test)
        def run(choice, **kwargs):
            with chosen(choice):
                try:
                    test(**kwargs)
                except RuntimeError as refusal:
                    able = choice in ("default", EVERYWHERE, "eager")
                    if able or REFUSAL not in str(refusal):
                        raise

        given = inspect.signature(test).parameters.values()
        choice = inspect.Parameter("choice", inspect.Parameter.KEYWORD_ONLY)
        run.__signature__ = inspect.Signature([*given, choice])
        return run

    return decorate


def outcome(module, x, dy):
    """All that a step with this module makes: y, gradients, buffers."""
    x = x.detach().requires_grad_()
    y = module(x)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(y, leaves, dy)
    return [y.detach(), *gradients, *module.buffers()]


def strides(t):
    """Those that say something: of the axes with more than one entry."""
    return [s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1]


def assert_same(actual, expected, tolerance=None, laid_out=2):
    """Equal values of one dtype; the first ones, y and dx, of one layout."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == b.dtype
        assert i >= laid_out or strides(a) == strides(b)
        assert_close(a, b, tolerance=tolerance)
