"""The oracle: every norm and its backward in NumPy, float64, by hand.

Nothing here is fast and nothing is borrowed: PyTorch is not imported, and the
gradients are written out. The rest of the package is tested against it.
"""

from typing import NamedTuple

import numpy
from numpy import ndarray

from normlib.axes import View, channel_view, stat_axes, trailing_view


class Cache(NamedTuple):
    """What the backward needs to remember from the forward."""

    xhat: ndarray
    rstd: ndarray
    weight: ndarray
    shape: tuple[int, ...]
    over_batch: bool
    centered: bool


def normalize(
    x: ndarray,
    view: View,
    weight: ndarray | None = None,
    bias: ndarray | None = None,
    eps: float = 1e-5,
    *,
    over_batch: bool = False,
    centered: bool = True,
) -> tuple[ndarray, Cache]:
    """Subtract the mean, divide by the standard deviation, scale and shift.

    ``y = weight * (x - mean) / sqrt(var + eps) + bias``, with mean and biased
    variance over (K, M), and over N too where ``over_batch``. Not centered,
    the mean is taken to be zero: the division is by the root mean square.

    Args:
        x: any shape with N·G·K·M values.
        view: how to see them as (N, G, K, M).
        weight: scale, G·K values in any shape; 1 by default.
        bias: shift, likewise; 0 by default.
        eps: added to the variance. Zero is allowed here.
        over_batch: whether the statistics run over the instances.
        centered: whether the mean is subtracted.

    Returns:
        y in the shape of x, and the cache for :func:`normalize_backward`.

    Raises:
        ValueError: eps is negative; the view, the weight or the bias does
            not fit x.
    """
    if eps < 0:
        raise ValueError(f"normalize eps must be non-negative, but got {eps}")
    x4 = numpy.asarray(x, dtype=numpy.float64).reshape(view)
    axes = stat_axes(over_batch)
    if centered:
        x4 = x4 - x4.mean(axes, keepdims=True)
    rstd = 1 / numpy.sqrt((x4**2).mean(axes, keepdims=True) + eps)
    xhat = x4 * rstd
    w = _parameter(weight, view, default=1.0)
    y = xhat * w + _parameter(bias, view, default=0.0)
    shape = numpy.shape(x)
    return y.reshape(shape), Cache(xhat, rstd, w, shape, over_batch, centered)


def normalize_backward(
    dy: ndarray, cache: Cache
) -> tuple[ndarray, ndarray, ndarray]:
    """Gradients of a loss with respect to x, weight and bias.

    With ``g = dy * weight`` and ⟨·⟩ the mean over the axes of the statistics,
    ``dx = rstd * (g - ⟨g⟩ - xhat * ⟨g * xhat⟩)``, and without ⟨g⟩ where the
    forward did not center. Derived in chapter 2.

    Args:
        dy: gradient of the loss with respect to y, in its shape.
        cache: from :func:`normalize`.

    Returns:
        dx in the shape of x; dweight and dbias of shape (G, K).
    """
    xhat, rstd, weight, shape, over_batch, centered = cache
    axes = stat_axes(over_batch)
    dy = numpy.asarray(dy, dtype=numpy.float64).reshape(xhat.shape)
    g = dy * weight
    dx = g - xhat * (g * xhat).mean(axes, keepdims=True)
    if centered:
        dx = dx - g.mean(axes, keepdims=True)
    dweight, dbias = (dy * xhat).sum((0, 3)), dy.sum((0, 3))
    return (rstd * dx).reshape(shape), dweight, dbias


def batch_norm(x, weight=None, bias=None, eps=1e-5):
    """Each channel of (N, C, ...) over the batch and the positions.

    This is training mode: the statistics are those of the batch. Weight and
    bias have shape (C,). Returns ``(y, cache)`` and raises as
    :func:`normalize` does. Ioffe & Szegedy (2015). Chapter 2.
    """
    view = channel_view(numpy.shape(x))
    return normalize(x, view, weight, bias, eps, over_batch=True)


def instance_norm(x, weight=None, bias=None, eps=1e-5):
    """Each channel of each instance of (N, C, ...) over its positions.

    Parameters, result and errors are as for :func:`batch_norm`. Ulyanov,
    Vedaldi & Lempitsky (2016). Chapter 5.
    """
    return normalize(x, channel_view(numpy.shape(x)), weight, bias, eps)


def group_norm(x, num_groups, weight=None, bias=None, eps=1e-5):
    """Each group of channels of each instance of (N, C, ...).

    Parameters, result and errors are as for :func:`batch_norm`, and
    ``num_groups`` must divide C. Wu & He (2018). Chapter 5.
    """
    view = channel_view(numpy.shape(x), num_groups)
    return normalize(x, view, weight, bias, eps)


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    """Each vector of (..., D) over its own entries.

    D may be several axes, ``normalized_shape``, which is the shape of weight
    and bias. Returns ``(y, cache)`` and raises as :func:`normalize` does. Ba,
    Kiros & Hinton (2016). Chapter 5.
    """
    view = trailing_view(numpy.shape(x), normalized_shape)
    return normalize(x, view, weight, bias, eps)


def rms_norm(x, normalized_shape, weight=None, eps=1e-5):
    """Layer norm without the mean and without a shift.

    Parameters, result and errors are as for :func:`layer_norm`. Zhang &
    Sennrich (2019). Chapter 5.
    """
    view = trailing_view(numpy.shape(x), normalized_shape)
    return normalize(x, view, weight, None, eps, centered=False)


def _parameter(p: ndarray | None, view: View, default: float) -> ndarray:
    if p is None:
        return numpy.full((1, view.G, view.K, 1), default)
    return numpy.asarray(p, dtype=numpy.float64).reshape(1, view.G, view.K, 1)
