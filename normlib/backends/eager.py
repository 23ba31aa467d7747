"""The formula itself, in PyTorch's own operations.

It serves every call: any shape, dtype and device, and whatever autograd,
functorch, ``torch.compile`` and ``torch.export`` make of it, because all of
it is made of differentiable operations. The other backends are measured
against it.
"""

import torch
from torch import Tensor

from normlib.axes import View, stat_axes
from normlib.stats import Moments, center

HALF = (torch.float16, torch.bfloat16)
"""The dtypes that are computed in float32."""


def available() -> bool:
    """Always."""
    return True


def supports(x, view, weight, bias, *, over_batch, centered) -> bool:
    """Always."""
    return True


def normalize(
    x: Tensor,
    view: View,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    over_batch: bool,
    centered: bool,
) -> tuple[Tensor, Moments]:
    """``y = weight * (x - mean) / sqrt(var + eps) + bias`` over the view.

    Returns:
        y in the shape and dtype of x, and the moments with shape
        (N, G, 1, 1), or (1, G, 1, 1) where ``over_batch``.
    """
    x4 = widen(settle(x)).reshape(view)
    axes = stat_axes(over_batch)
    if centered:
        x4, moments = center(x4, axes)
    else:
        moments = Moments.about_zero(x4, axes)
    shape = (1, view.G, view.K, 1)
    weight = None if weight is None else weight.reshape(shape)
    bias = None if bias is None else bias.reshape(shape)
    y = affine(x4, None, moments.var, weight, bias, eps)
    return restore(y, x), moments


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
    channels_last = x.dim() in (4, 5) and x.movedim(1, -1).is_contiguous()
    return x if channels_last or x.is_contiguous() else x.contiguous()


def restore(y: Tensor, x: Tensor) -> Tensor:
    """Give y, freshly computed in another shape, the shape and dtype of x.

    Not by an ordinary view: autograd would tie the caller's in-place
    operations on the output to a base that nobody else holds.
    """
    return torch.ops.aten._unsafe_view(y, x.shape).to(x.dtype)
