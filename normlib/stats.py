"""Moments, and how they merge.

A count, a mean and a variance are enough to know the mean and variance of two
samples put together, without seeing either sample again:
:meth:`Moments.merge`. :class:`Population` does so over batches.

What a batch-norm layer keeps for test time is cheaper and forgets:
:class:`ExponentialAverage` and :class:`CumulativeAverage` average the
statistics of batches. The three have the same few verbs, ``update``, ``mean``
and ``var``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """How many values, their mean, and their biased variance.

    ``mean`` and ``var`` are tensors of one shape, one entry for each
    statistic; ``count`` is the number of values behind each entry.

    Chapter 4.
    """

    count: float
    mean: Tensor
    var: Tensor

    @classmethod
    def of(
        cls,
        x: Tensor,
        axes: Sequence[int],
        dtype: torch.dtype | None = None,
    ) -> "Moments":
        """The moments of x (floating point); the axes stay with size 1.

        They are of the dtype of x, or of the one given: the mean of float32
        values around a million has more digits than float32 holds, and
        merging needs them.
        """
        if dtype is None:
            return center(x, axes)[1]
        shift = x.mean(tuple(axes), keepdim=True)
        rest = center(x - shift, axes)[1]
        mean = shift.to(dtype) + rest.mean.to(dtype)
        return cls(rest.count, mean, rest.var.to(dtype))

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
        newcomers, and the variance gains what lies between the two means. An
        empty sample adds nothing.
        """
        if other.count == 0:
            return self
        if self.count == 0:
            return other
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
    one is small, and its rounding smaller still. For gradients the first
    step is a shift by a constant: centering undoes any shift. The variance is
    the mean square of what is left; ``E[x^2] - E[x]^2`` would need one pass
    and lose every digit where the mean is large.

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
    *,
    unbiased: bool = True,
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
        unbiased: where False, take the biased variance, as Keras 3 does.

    Chapter 4.
    """
    if batch.count == 0:
        return
    var = batch.unbiased_var if unbiased else batch.var
    pairs = ((running_mean, batch.mean), (running_var, var))
    moved = [
        new.reshape(old.shape) * momentum + old.to(new.dtype) * (1 - momentum)
        for old, new in pairs
    ]
    running_mean.copy_(moved[0])
    running_var.copy_(moved[1])


class _Average:
    """What the averages over batches share: they start at mean 0, var 1."""

    def __init__(self, unbiased: bool) -> None:
        self.unbiased = unbiased
        self.steps = 0
        self._mean: Tensor | None = None
        self._var: Tensor | None = None

    @torch.no_grad()
    def update(self, batch: Moments) -> None:
        """Take in the moments of a batch; an empty one changes nothing.

        Raises:
            ValueError: one value per statistic, where the unbiased variance
                is wanted; moments of another shape than before.
        """
        _check_batch(batch, self._mean, self.unbiased)
        if batch.count == 0:
            return
        # In 16 bits an average stops moving long before it has arrived.
        dtype = torch.promote_types(batch.mean.dtype, torch.float32)
        batch = Moments(batch.count, *(p.to(dtype) for p in batch[1:]))
        if self._mean is None:
            self._mean = torch.zeros_like(batch.mean)
            self._var = torch.ones_like(batch.var)
        update_running(
            *(self._mean, self._var, batch, self._next_momentum()),
            unbiased=self.unbiased,
        )
        self.steps += 1

    @property
    def mean(self) -> Tensor:
        """The estimate of the mean, in the shape of the batches' means."""
        return self._estimate(self._mean, start=0.0)

    @property
    def var(self) -> Tensor:
        """The estimate of the variance, likewise."""
        return self._estimate(self._var, start=1.0)

    def _estimate(self, running: Tensor | None, start: float) -> Tensor:
        if running is None:
            raise RuntimeError(f"{type(self).__name__} has seen no batch yet")
        return running.clone()

    def _next_momentum(self) -> float:
        raise NotImplementedError


class ExponentialAverage(_Average):
    """Average the moments of batches, the older the less.

    ``running = (1 - momentum) * running + momentum * batch``. After t
    batches the one of k steps ago has the weight
    ``momentum * (1 - momentum)^k``, and the start (mean 0, variance 1) still
    has :attr:`missing` ``= (1 - momentum)^t``. This is what
    :class:`normlib.BatchNorm` and torch.nn keep; :meth:`with_decay` is what
    Keras 3 and flax keep.

    Args:
        momentum: weight of the newcomer, above 0 and at most 1.
        unbiased: whether to average unbiased variances.
        debias: whether to take the start's share out of the estimates, and
            divide by the weight of what is left, as Adam does.

    Raises:
        ValueError: another momentum.

    Kingma & Ba (2015, section 3) for the correction. Chapter 4.
    """

    def __init__(
        self,
        momentum: float = 0.1,
        *,
        unbiased: bool = True,
        debias: bool = False,
    ) -> None:
        super().__init__(unbiased)
        if not 0 < momentum <= 1:
            raise ValueError(
                f"momentum must be in (0, 1], but got {momentum}: it is the "
                "weight of the new batch"
            )
        self.momentum = momentum
        self.debias = debias

    @classmethod
    def with_decay(
        cls, decay: float = 0.99, *, unbiased: bool = False, debias=False
    ) -> "ExponentialAverage":
        """In TensorFlow's convention: the weight of the *past* is given.

        Its ``momentum=0.99`` is ``momentum=0.01`` here, and Keras 3
        averages biased variances.
        """
        return cls(1 - decay, unbiased=unbiased, debias=debias)

    @property
    def missing(self) -> float:
        """The share of the start in the running values."""
        return (1 - self.momentum) ** self.steps

    def _estimate(self, running, start):
        running = super()._estimate(running, start)
        if not self.debias:
            return running
        return (running - self.missing * start) / (1 - self.missing)

    def _next_momentum(self):
        return self.momentum


class CumulativeAverage(_Average):
    """Average the moments of all batches, each with the same weight.

    What :class:`normlib.BatchNorm` keeps with ``momentum=None``. The average
    of the batches' variances is not the variance of all values:
    :class:`Population` is.

    Args:
        unbiased: whether to average unbiased variances.

    Chapter 4.
    """

    def __init__(self, *, unbiased: bool = True) -> None:
        super().__init__(unbiased)

    def _next_momentum(self):
        return 1 / (self.steps + 1)


class Population:
    """The moments of all values of all batches, merged exactly.

    In float64 and by :meth:`Moments.merge`: batches of any sizes, in any
    order, give the mean and the variance that their values have together.
    Take the batches' moments in float64, too, where the values are far from
    zero: ``Moments.of(x, axes, dtype=torch.float64)``.

    Chan, Golub & LeVeque (1979). Chapter 4.
    """

    def __init__(self) -> None:
        self._moments: Moments | None = None

    @torch.no_grad()
    def update(self, batch: Moments) -> None:
        """Take in the moments of a batch; an empty one changes nothing.

        Raises:
            ValueError: moments of another shape than before.
        """
        seen = self._moments
        _check_batch(batch, None if seen is None else seen.mean, False)
        if batch.count == 0:
            return
        # Copies, so that no graph is kept, nor what others may change.
        mean, var = (t.to(torch.float64, copy=True) for t in batch[1:])
        batch = Moments(batch.count, mean, var)
        self._moments = batch if seen is None else seen.merge(batch)

    @property
    def count(self) -> float:
        """How many values there were for each statistic."""
        return 0 if self._moments is None else self._moments.count

    @property
    def mean(self) -> Tensor:
        """The mean of all values."""
        return self._seen.mean.clone()

    @property
    def var(self) -> Tensor:
        """The biased variance of all values."""
        return self._seen.var.clone()

    @property
    def unbiased_var(self) -> Tensor:
        """The unbiased variance of all values."""
        return self._seen.unbiased_var

    @property
    def _seen(self) -> Moments:
        if self._moments is None:
            raise RuntimeError("Population has seen no batch yet")
        return self._moments


def _check_batch(batch: Moments, old: Tensor | None, unbiased: bool) -> None:
    if unbiased and batch.count == 1:
        raise ValueError(
            "one value per statistic has no unbiased variance: got a batch "
            f"with count={batch.count}"
        )
    if old is not None and old.shape != batch.mean.shape:
        raise ValueError(
            f"moments of shape {tuple(batch.mean.shape)} do not continue "
            f"those of shape {tuple(old.shape)}"
        )


def _count(x: Tensor, axes: Sequence[int]) -> int:
    count = 1
    for axis in axes:
        count = count * x.shape[axis]
    return count
