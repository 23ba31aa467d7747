"""The table of norms as test cases, and shapes with their reasons."""

from typing import NamedTuple

import torch

from normlib import axes, reference


class Case(NamedTuple):
    """A norm on a shape: in NumPy, in normlib, in torch, on its view."""

    norm: str
    shape: tuple[int, ...]
    groups: int | None = None
    normalized: tuple[int, ...] | None = None

    @property
    def view(self) -> axes.View:
        if self.normalized:
            return axes.trailing_view(self.shape, self.normalized)
        return axes.channel_view(self.shape, self.groups)

    @property
    def kind(self) -> dict:
        row = axes.TABLE[self.norm]
        return {"over_batch": row.over_batch, "centered": row.centered}

    @property
    def has_bias(self) -> bool:
        return self.norm != "rms_norm"

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        return self.normalized or (self.shape[1],)

    def reference(self, x, weight, bias, eps):
        """The norm by its own function in normlib.reference."""
        function = getattr(reference, self.norm)
        args = ([self.groups] if self.groups else []) + (
            [self.normalized] if self.normalized else []
        )
        parameters = [weight, bias] if self.has_bias else [weight]
        return function(x, *args, *parameters, eps=eps)

    def of(self, library, x, weight, bias, eps):
        """The norm by its own function in normlib's or torch's functional."""
        function = getattr(library, self.norm)
        if self.norm == "batch_norm":
            return function(x, None, None, weight, bias, True, 0.1, eps)
        if self.norm == "instance_norm":
            return function(x, None, None, weight, bias, eps=eps)
        if self.norm == "group_norm":
            return function(x, self.groups, weight, bias, eps)
        if self.norm == "layer_norm":
            return function(x, self.normalized, weight, bias, eps)
        return function(x, self.normalized, weight, eps)


CASES = {
    "batch, dense": Case("batch_norm", (7, 5)),
    "batch, two instances": Case("batch_norm", (2, 3)),
    "batch, one channel": Case("batch_norm", (5, 1, 3)),
    "batch, one instance": Case("batch_norm", (1, 3, 4, 4)),
    "batch, odd image": Case("batch_norm", (3, 5, 7, 3)),
    "batch, volume": Case("batch_norm", (2, 3, 2, 3, 2)),
    "instance, signal": Case("instance_norm", (3, 2, 9)),
    "instance, image": Case("instance_norm", (2, 5, 3, 5)),
    "group, pairs": Case("group_norm", (3, 6, 5), groups=3),
    "group, one": Case("group_norm", (2, 6, 3, 3), groups=1),
    "group, no positions": Case("group_norm", (4, 6), groups=2),
    "layer, tokens": Case("layer_norm", (2, 3, 8), normalized=(8,)),
    "layer, image": Case("layer_norm", (3, 2, 3, 5), normalized=(2, 3, 5)),
    "rms, tokens": Case("rms_norm", (2, 5, 7), normalized=(7,)),
}


def draw(case: Case, seed: int = 0, mean: float = 0.5):
    """x, weight, bias and an upstream gradient, float64, none of them 1.

    The upstream gradient is random: with ``y.sum()`` as the loss, dx of a
    norm is zero whatever the backward does.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    x = normal(case.shape) * 2.0 + mean
    weight = normal(case.parameter_shape) + 0.5
    bias = normal(case.parameter_shape) if case.has_bias else None
    return x, weight, bias, normal(case.shape)
