"""The norms as functions on PyTorch tensors.

:func:`normalize` is the one formula, and the one place where a backend is
chosen. :func:`batch_norm` has the signature of
:func:`torch.nn.functional.batch_norm`. :func:`moments` and
:func:`batch_normalization` are TensorFlow's pair from ``tf.nn``.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from normlib import backends
from normlib.axes import View, channel_view
from normlib.backends.eager import HALF, affine, restore, settle, widen
from normlib.stats import Moments, update_running


def normalize(
    x: Tensor,
    view: View,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    over_batch: bool = False,
    centered: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every normalization: ``weight * (x - mean) / sqrt(var + eps) + bias``.

    Mean and biased variance are taken over the axes (K, M) of the view
    (N, G, K, M), and over N too where ``over_batch``. float16 and bfloat16
    are computed in float32, and y is rounded back.

    Args:
        x: floating point, any shape with N·G·K·M values.
        view: how to see it as (N, G, K, M); see :mod:`normlib.axes`.
        weight: scale, G·K values in any shape; none means 1.
        bias: shift, likewise; none means 0.
        eps: added to the variance, in its units (those of x squared).
        over_batch: whether the statistics run over the instances too.
        centered: where False, the mean counts as zero and the division is
            by the root mean square.

    Returns:
        y in the shape and dtype of x; mean and var of shape (N, G), or (G,)
        where ``over_batch``.

    Raises:
        NotImplementedError: x is not floating point.
        ValueError: eps is negative.
        RuntimeError: the view, the weight or the bias does not fit x.

    Chapter 2.
    """
    _check_floating("normalize", x)
    if eps < 0.0:
        raise ValueError(f"normalize eps must be non-negative, but got {eps}")
    _check_view(x, view)
    _check_parameters(x, view.G * view.K, weight=weight, bias=bias)
    y, moments = _normalize(x, view, weight, bias, eps, over_batch, centered)
    shape = (view.G,) if over_batch else (view.N, view.G)
    return y, moments.mean.reshape(shape), moments.var.reshape(shape)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize each channel over the batch and the positions.

    In training, by the batch's mean and biased variance; the running
    statistics, where given, move towards the mean and the *unbiased*
    variance in place. Otherwise by the running statistics.

    Args:
        input: (N, C) or (N, C, ...), floating point.
        running_mean: (C,), or None.
        running_var: (C,), or None; both or neither in training.
        weight: scale, (C,), or None. float32 for a 16-bit input, or else of
            the input's dtype, like the other three.
        bias: shift, (C,), or None.
        training: whether to use the batch's statistics.
        momentum: weight of this batch in the running statistics (1 means:
            forget the past).
        eps: added to the variance.

    Returns:
        y in the shape and dtype of the input.

    Raises:
        IndexError: the input has fewer than two axes.
        NotImplementedError: the input is not floating point.
        ValueError: one value per channel in training; eps that is not
            positive in training, or negative; one running statistic.
        RuntimeError: sizes or dtypes that do not match; evaluation without
            running statistics.

    A call that refuses its input leaves the running statistics as they were.
    Ioffe & Szegedy (2015). Chapter 2.
    """
    _check_batch_norm(
        input, running_mean, running_var, weight, bias, training, eps
    )
    view = channel_view(input.shape)
    if not training:
        parts = (running_mean, running_var, weight, bias)
        shape = (1, view.G, 1, 1)
        y = affine(
            widen(settle(input)).reshape(view),
            *(p if p is None else widen(p).reshape(shape) for p in parts),
            eps,
        )
        return restore(y, input)
    y, batch = _normalize(input, view, weight, bias, eps, True, True)
    if running_mean is not None:
        update_running(running_mean, running_var, batch, momentum)
    return y


def moments(
    x: Tensor,
    axes: int | Sequence[int],
    shift: Tensor | None = None,
    keepdims: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over some axes, as ``tf.nn.moments``.

    Args:
        x: floating point. float16 and bfloat16 are summed in float32.
        axes: to average over, such as ``[0]`` for (N, C) or ``[0, 1, 2]``
            for (N, H, W, C). Over no axes each value is its own mean.
        shift: accepted and not used, as in TensorFlow.
        keepdims: whether the axes stay, with size 1.

    Returns:
        mean and variance in the dtype of x.

    Raises:
        NotImplementedError: x is not floating point.

    Chapter 2.
    """
    _check_floating("moments", x)
    axes = tuple(axes) if isinstance(axes, Iterable) else (axes,)
    if not axes:  # each value is its own mean
        return x.clone(), torch.zeros_like(x)
    found = Moments.of(widen(x), axes)
    both = (found.mean, found.var)
    if not keepdims:
        both = tuple(m.squeeze(axes) for m in both)
    return both[0].to(x.dtype), both[1].to(x.dtype)


def batch_normalization(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    offset: Tensor | None,
    scale: Tensor | None,
    variance_epsilon: float,
) -> Tensor:
    """``scale * (x - mean) / sqrt(variance + variance_epsilon) + offset``.

    As ``tf.nn.batch_normalization``: the statistics come from outside, and
    **offset stands before scale**. It keeps no running statistics and knows
    no training mode.

    Args:
        x: floating point, any shape.
        mean: broadcasts against x, as do the next three.
        variance: likewise.
        offset: beta, or None.
        scale: gamma, or None.
        variance_epsilon: added to the variance; TensorFlow has no default,
            Keras' is 1e-3.

    Returns:
        y in the shape and dtype of x.

    Raises:
        NotImplementedError: x is not floating point.
        ValueError: the epsilon is negative.

    Chapter 2.
    """
    _check_floating("batch_normalization", x)
    if variance_epsilon < 0.0:
        raise ValueError(
            "batch_normalization variance_epsilon must be non-negative, "
            f"but got {variance_epsilon}"
        )
    parts = (x, mean, variance, scale, offset)
    wide = (widen(p) if isinstance(p, Tensor) else p for p in parts)
    return affine(*wide, variance_epsilon).to(x.dtype)


_DTYPES = (torch.float64, torch.float32, *HALF)


def _normalize(x, view, weight, bias, eps, over_batch, centered):
    kind = {"over_batch": over_batch, "centered": centered}
    backend = backends.pick(x, view, weight, bias, **kind)
    return backend.normalize(x, view, weight, bias, eps, **kind)


def _check_batch_norm(
    x, running_mean, running_var, weight, bias, training, eps
):
    shape = tuple(x.shape)
    if len(shape) < 2:
        raise IndexError(
            f"batch_norm takes (N, C, ...), at least 2 axes; got shape {shape}"
        )
    _check_floating("batch_norm", x)
    statistics = {"running_mean": running_mean, "running_var": running_var}
    missing = [name for name, p in statistics.items() if p is None]
    if training:
        if len(missing) == 1:
            raise ValueError(
                "running_mean and running_var must either both be None or "
                f"neither be None; {missing[0]} is None"
            )
        if channel_view(shape).count(over_batch=True) == 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, "
                f"got input size {shape}"
            )
        if eps <= 0.0:
            raise ValueError(
                "batch_norm eps must be positive during training, "
                f"but got {eps}"
            )
    elif missing:
        raise RuntimeError(
            f"{missing[0]} must be defined in evaluation mode; it is None"
        )
    elif eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    _check_parameters(
        x,
        shape[1],
        **statistics,
        weight=weight,
        bias=bias,
    )
    for name, running in statistics.items():
        if training and running is not None and running.requires_grad:
            raise RuntimeError(
                f"{name} is updated in place and has no gradient, "
                "but requires_grad is True"
            )


def _check_floating(function: str, x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise NotImplementedError(
            f'"{function}" not implemented for {x.dtype}: '
            f"the input must be one of {', '.join(map(str, _DTYPES))}"
        )


def _check_view(x: Tensor, view: View) -> None:
    n, g, k, m = view
    if x.numel() != n * g * k * m:
        raise RuntimeError(
            f"view {tuple(view)} holds {n * g * k * m} values, "
            f"but the input of shape {tuple(x.shape)} has {x.numel()}"
        )


def _check_parameters(x: Tensor, size: int, **parameters) -> None:
    given = {k: p for k, p in parameters.items() if p is not None}
    for name, p in given.items():
        if p.numel() != size:
            raise RuntimeError(
                f"{name} should contain {size} elements not {p.numel()} "
                f"(input of shape {tuple(x.shape)})"
            )
    dtypes = {p.dtype for p in given.values()}
    allowed = {x.dtype, torch.float32} if x.dtype in HALF else {x.dtype}
    if len(dtypes) > 1 or not dtypes <= allowed:
        raise RuntimeError(
            f"mixed dtype: parameters of an input of {x.dtype} must all be "
            f"of one dtype out of {sorted(map(str, allowed))}; got "
            + ", ".join(f"{name} {p.dtype}" for name, p in given.items())
        )
