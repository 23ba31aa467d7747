"""The formula itself, in PyTorch's own operations.

It serves every call: any shape, dtype and device, and whatever autograd,
functorch, ``torch.compile`` and ``torch.export`` make of it, because all of
it is made of differentiable operations. The other backends are measured
against it.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from normlib.axes import View, stat_axes
from normlib.stats import Moments, center

HALF = (torch.float16, torch.bfloat16)
"""The dtypes that are computed in float32."""

ACTIVATIONS = {"relu": F.relu, "silu": F.silu}
"""The functions that can follow a norm in one step, by name."""


def available() -> bool:
    """Always."""
    return True


def supports(x, view, weight, bias, *, over_batch, centered) -> bool:
    """Always."""
    return True


def least(norm, x, weight) -> float:
    """Infinitely many."""
    return math.inf


def pays(x, view, weight, bias, *, over_batch, centered) -> bool:
    """Never: this is what the others are measured against."""
    return False


def normalize(
    x: Tensor,
    view: View,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    over_batch: bool,
    centered: bool,
    moments: bool = True,
) -> tuple[Tensor, Moments]:
    """``y = weight * (x - mean) / sqrt(var + eps) + bias`` over the view.

    The moments come with y whether they are wanted or not.

    Returns:
        y in the shape and dtype of x, and the moments with shape
        (N, G, 1, 1), or (1, G, 1, 1) where ``over_batch``.
    """
    x4, found = _center(x, view, over_batch, centered)
    weight, bias = (_parameter(p, view) for p in (weight, bias))
    y = affine(x4, None, found.var, weight, bias, eps)
    return restore(y, x), found


def evaluate(
    x: Tensor,
    view: View,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """The same by given statistics, one for each group, as constants."""
    shape = (1, view.G, 1, 1)
    mean, var = (widen(p).reshape(shape) for p in (mean, var))
    weight, bias = (_parameter(p, view) for p in (weight, bias))
    x4 = widen(settle(x)).reshape(view)
    return restore(affine(x4, mean, var, weight, bias, eps), x)


def backward(
    dy: Tensor | None,
    x: Tensor,
    view: View,
    weight: Tensor | None,
    eps: float,
    needs: Sequence[bool],
    dmean: Tensor | None = None,
    dvar: Tensor | None = None,
    *,
    over_batch: bool,
    centered: bool,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of :func:`normalize`, by differentiable operations.

    With ``g = dy * weight`` and ⟨·⟩ the mean over the statistics' axes,
    ``dx = rstd * (g - ⟨g⟩ - xhat * ⟨g * xhat⟩)``, without ⟨g⟩ where not
    centered. The statistics are taken from x again: so this can itself be
    differentiated, as often as one likes.

    Args:
        dy: gradient with respect to y, or None for zero.
        x: as in the forward, as are the next three.
        view: see there.
        weight: see there.
        eps: see there.
        needs: whether dx, dweight and dbias are wanted.
        dmean: gradient with respect to the mean, or None for zero.
        dvar: gradient with respect to the biased variance, likewise.
        over_batch: see there.
        centered: see there.
        bias: see there; it counts where there is an activation.
        activation: of y, where dy is the gradient of that: a name in
            :data:`ACTIVATIONS`.

    Returns:
        dx in the shape and dtype of x; dweight and dbias of shape (G, K);
        each None where it is not wanted.

    Chapter 2.
    """
    axes, count = stat_axes(over_batch), view.count(over_batch)
    centered_x, found = _center(x, view, over_batch, centered)
    rstd = torch.rsqrt(found.var + eps)
    xhat = centered_x * rstd
    dy = torch.zeros_like(xhat) if dy is None else widen(dy).reshape(view)
    if activation is not None:
        scale, shift = (_parameter(p, view) for p in (weight, bias))
        z = affine(centered_x, None, found.var, scale, shift, eps)
        dy = _through(dy, z, activation)
    dx = dweight = dbias = None
    if needs[0]:
        g = dy if weight is None else dy * _parameter(weight, view)
        dx = g - xhat * (g * xhat).mean(axes, keepdim=True)
        if centered:
            dx = dx - g.mean(axes, keepdim=True)
        dx = dx * rstd
        if dmean is not None and centered:
            dx = dx + dmean.reshape(found.mean.shape) / count
        if dvar is not None:
            share = 2 / count * dvar.reshape(found.var.shape)
            dx = dx + share * centered_x
        dx = restore(dx, x)
    if needs[1]:
        dweight = (dy * xhat).sum((0, 3))
    if needs[2]:
        dbias = dy.sum((0, 3))
    return dx, dweight, dbias


def activate(z: Tensor, activation: str | None) -> Tensor:
    """The activation of z; z itself where it is None."""
    return z if activation is None else ACTIVATIONS[activation](z)


def moments(x: Tensor, view: View, *, over_batch: bool, centered: bool):
    """The moments alone, as :func:`normalize` returns them."""
    return _center(x, view, over_batch, centered)[1]


def affine(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias``, shapes broadcast."""
    y = x if mean is None else x - mean
    y = y * torch.rsqrt(var + eps)
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


def widen(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; the others as they are.

    Statistics are never taken in 16 bits: their sums would overflow
    (float16) or stop growing (bfloat16).
    """
    return x.float() if x.dtype in HALF else x


def settle(x: Tensor) -> Tensor:
    """Make x contiguous, unless it is so already with its channels last.

    As torch's own norms do, so that the output's layout is theirs too.
    """
    if x.is_contiguous():
        return x
    last = x.dim() in (4, 5) and x.movedim(1, -1).is_contiguous()
    return x if last else x.contiguous()


def restore(y: Tensor, x: Tensor) -> Tensor:
    """Give y, freshly computed in another shape, the shape and dtype of x.

    Not by an ordinary view: autograd would tie the caller's in-place
    operations on the output to a base that nobody else holds.
    """
    return torch.ops.aten._unsafe_view(y, x.shape).to(x.dtype)


def _center(x, view, over_batch, centered):
    """See x as (N, G, K, M), less its mean where asked; and its moments."""
    x4, axes = widen(settle(x)).reshape(view), stat_axes(over_batch)
    if centered:
        return center(x4, axes)
    return x4, Moments.about_zero(x4, axes)


def _through(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """The gradient with respect to z, given that of its activation."""
    if activation == "relu":
        return torch.where(z <= 0, 0.0, dy)
    sigmoid = torch.sigmoid(z)
    return dy * sigmoid * (1 + z * (1 - sigmoid))


def _parameter(p: Tensor | None, view: View) -> Tensor | None:
    """One value for each channel, or for each group, beside (N, G, K, M)."""
    return None if p is None else p.reshape(1, view.G, view.K, 1)
