"""Moments, and how they merge.

A count, a mean and a variance are enough to know the mean and variance of two
samples put together, without seeing either sample again. Running statistics
merge over steps, and the same rule serves wherever data come in parts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """How many values, their mean, and their biased variance.

    ``mean`` and ``var`` are tensors of one shape, one entry for each
    statistic; ``count`` is the number of values behind each entry.
    """

    count: float
    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, x: Tensor, axes: Sequence[int]) -> "Moments":
        """The moments of x (floating point); the axes stay with size 1."""
        return center(x, axes)[1]

    @classmethod
    def about_zero(cls, x: Tensor, axes: Sequence[int]) -> "Moments":
        """The same with the mean taken to be zero: ``var`` is mean square."""
        square = x.square().mean(tuple(axes), keepdim=True)
        return cls(_count(x, axes), torch.zeros_like(square), square)

    @property
    def unbiased_var(self) -> Tensor:
        """The variance with ``count - 1`` in place of ``count`` (Bessel).

        Infinite or NaN where the count is 1: one value says nothing about
        a variance.
        """
        bessel = (
            self.count / (self.count - 1) if self.count != 1 else torch.inf
        )
        return self.var * bessel

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both samples together.

        Chan, Golub & LeVeque (1979): the mean moves by the share of the
        newcomers, and the variance gains what lies between the two means.
        """
        count = self.count + other.count
        share = other.count / count
        delta = other.mean - self.mean
        mean = self.mean + delta * share
        within = self.var + (other.var - self.var) * share
        between = delta.square() * (share * (1 - share))
        return Moments(count, mean, within + between)


def center(x: Tensor, axes: Sequence[int]) -> tuple[Tensor, Moments]:
    """Take the mean out of x over some axes; also return the moments.

    In two steps. The mean of far-away values comes out rounded to *their*
    precision, so what is left after subtracting it still has a mean; that
    one is small, and goes exactly. For gradients the first step is a shift
    by a constant: centering undoes any shift. The variance is the mean
    square of what is left; ``E[x^2] - E[x]^2`` would need one pass and lose
    every digit where the mean is large.

    Args:
        x: floating point.
        axes: to average over.

    Returns:
        The centered x, and the moments, whose axes stay with size 1.
    """
    axes = tuple(axes)
    shift = x.mean(axes, keepdim=True).detach()
    x = x - shift
    rest = x.mean(axes, keepdim=True)
    x = x - rest
    # An infinite mean stays infinite: x - shift has made NaN of the rest.
    mean = torch.where(shift.isinf(), shift, shift + rest)
    var = x.square().mean(axes, keepdim=True)
    return x, Moments(_count(x, axes), mean, var)


@torch.no_grad()
def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    batch: Moments,
    momentum: float | Tensor,
) -> None:
    """Move running statistics towards a batch's, in place.

    ``running = (1 - momentum) * running + momentum * batch``, where the
    batch's variance is the unbiased one. ``momentum`` has PyTorch's sense:
    the weight of the newcomer (Keras' 0.99 is 0.01 here). With
    ``momentum = 1 / t`` at step t this is the cumulative average.

    Args:
        running_mean: one entry for each statistic, any floating dtype.
        running_var: likewise.
        batch: the batch's moments. An empty batch changes nothing.
        momentum: a number or a tensor without axes.
    """
    if batch.count == 0:
        return
    pairs = ((running_mean, batch.mean), (running_var, batch.unbiased_var))
    moved = [
        new.reshape(old.shape) * momentum + old.to(new.dtype) * (1 - momentum)
        for old, new in pairs
    ]
    running_mean.copy_(moved[0])
    running_var.copy_(moved[1])


def _count(x: Tensor, axes: Sequence[int]) -> int:
    count = 1
    for axis in axes:
        count = count * x.shape[axis]
    return count
