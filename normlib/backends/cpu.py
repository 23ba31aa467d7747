"""Fast passes over plain CPU tensors, made of torch's own kernels.

No kernel is new here. Each of torch's norms is slow at something that
another of its kernels does fast, and the one formula says which may stand in
for which:

* Batch norm over images: its pass for the statistics is slow. Sums and norms
  of the rows, merged in float64, give the same; then one pass of batch norm
  in evaluation mode.
* Rows of contiguous values that share one weight (instance norm, layer and
  group norm without weight): forward, group norm with one group a row;
  backward, batch norm with one channel a row.
* Channels last, statistics of a sample: each sample is a batch to batch
  norm, and the channels of a group merge.
* RMS norm: torch composes it of whole passes over memory. Here they run over
  blocks of rows that stay in the cache, and the backward is layer norm's
  with mean 0, less the term that would keep the mean.

The rest is torch's own kernel. Tensors come without a graph: the autograd
around these passes is in :mod:`normlib.backends.fused`. Nothing that is
passed in is written to.

Chapter 5.
"""

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from normlib.axes import View
from normlib.backends import fused

_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default
_group_norm_backward = torch.ops.aten.native_group_norm_backward.default
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default

BLOCK = 1 << 18
"""Values in a block of rows: what two cores' caches hold of it and of what
is computed from it."""

CHAIN = 4096
"""The longest sum of squares that is left to float32: its rounding error
grows with the length, as torch's vector norm adds in a few long chains."""


class _Path(NamedTuple):
    """A way to compute: forward, backward, and what it is worth."""

    forward: Callable
    backward: Callable
    least: float
    """Values in x from which on it beats torch.nn; infinite where never."""


def available() -> bool:
    """Always: every torch has a CPU."""
    return True


def supports(
    x: Tensor,
    view: View,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    over_batch: bool,
    centered: bool,
) -> bool:
    """Whether a path serves this call, at any size.

    float32 and float64, weight and bias of the same dtype, x contiguous or
    with its channels last, more than one value to a statistic.
    """
    dtypes = {p.dtype for p in (x, weight, bias) if p is not None}
    return (
        x.device.type == "cpu"
        and x.numel() > 0
        and view.count(over_batch) > 1
        and len(dtypes) == 1
        and x.dtype in (torch.float32, torch.float64)
        and _path(x, view, weight, over_batch, centered) is not None
    )


def least(norm: str, x: Tensor, weight: Tensor | None) -> float:
    """How many values a call must have for :func:`pays` to be asked.

    Cheap and by name, because it is asked of calls that gain nothing, too.
    """
    if norm == "evaluation":
        return math.inf
    if norm == "normalize":  # by a view, whichever norm that is
        return 0
    if not x.is_contiguous():
        return _LAST.least if norm in _BY_SAMPLE else math.inf
    if norm == "layer_norm" and weight is not None:
        return _LAYER.least
    if norm == "group_norm" and weight is not None:
        return _GROUPS.least
    return _CONTIGUOUS[norm].least


def pays(
    x: Tensor,
    view: View,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    over_batch: bool,
    centered: bool,
) -> bool:
    """Whether it is faster than torch.nn's own kernel, as measured.

    ``python -m benchmarks.speed`` measures it.
    """
    path = _path(x, view, weight, over_batch, centered)
    return path is not None and x.numel() >= path.least


def forward(
    x: Tensor,
    view: View,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    over_batch: bool,
    centered: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """``weight * (x - mean) * rstd + bias`` over the view.

    Returns:
        y, new, in the shape, dtype and memory format of x; mean, biased var
        and rstd of shape (N, G), or (G,) where ``over_batch``. mean is None
        where not ``centered``; var is None where not ``over_batch``.
    """
    path = _path(x, view, weight, over_batch, centered)
    return path.forward(x, view, _flat(weight), _flat(bias), eps)


def backward(
    dy: Tensor,
    x: Tensor,
    view: View,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    needs: tuple[bool, bool, bool],
    *,
    over_batch: bool,
    centered: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dx = rstd * (g - ⟨g⟩ - xhat * ⟨g * xhat⟩)`` with ``g = dy * weight``.

    Args:
        dy: of the shape of x, with any strides.
        x: the forward's input, as are view and weight.
        view: of x.
        weight: G·K values, or None.
        mean: from :func:`forward`, as is rstd.
        rstd: of the shape (N, G), or (G,).
        needs: whether dx, dweight and dbias are wanted.
        over_batch: whether the statistics ran over the instances.
        centered: whether the mean was subtracted.

    Returns:
        dx, dweight and dbias; None in place of what is not wanted.
    """
    path = _path(x, view, weight, over_batch, centered)
    return path.backward(dy, x, view, _flat(weight), mean, rstd, needs)


def _path(x, view, weight, over_batch, centered) -> _Path | None:
    contiguous = x.is_contiguous()
    if not contiguous and not _channels_last(x):
        return None
    channels = x.dim() > 1 and x.shape[1] == view.G * view.K
    if over_batch:
        return _BATCH if centered and channels and view.K == 1 else None
    if not contiguous:
        return _LAST if centered and channels else None
    one_each = view.M == 1 and view.G == 1
    if not centered:
        return _RMS if one_each else None
    if weight is None or view.K == 1:
        return _ROWS
    return _LAYER if one_each else _GROUPS


# Batch norm


def _batch_forward(x, view, weight, bias, eps):
    mean, var = _batch_moments(x, view)
    rstd = (var + eps).rsqrt().to(x.dtype)
    mean, var = mean.to(x.dtype), var.to(x.dtype)
    y, _, _ = torch.native_batch_norm(
        x, weight, bias, mean, var, False, 0.0, eps
    )
    return y, mean, var, rstd


def _batch_backward(dy, x, view, weight, mean, rstd, needs):
    if weight is None:
        weight = rstd.new_ones(view.G)
    grads = _batch_norm_backward(
        dy, x, weight, None, None, mean, rstd, True, 0.0, list(needs)
    )
    return _wanted(grads, needs)


def _batch_moments(x, view):
    """The mean and the biased variance of each channel, in float64."""
    n, c, _, m = view
    if m == 1 or not x.is_contiguous():
        return _torch_moments(x)
    length = _chain(m)
    rows = x.view(n, c, m // length, length)
    count = n * m
    mean = rows.sum(3).sum((0, 2), dtype=torch.float64) / count
    norm = torch.linalg.vector_norm(rows, 2, 3).double()
    var = norm.square_().sum((0, 2)) / count - mean.square()
    # A mean far from 0 has eaten the digits of the difference above. NaN
    # fails the comparison too.
    if length <= CHAIN and (mean.square() <= 8 * var).all():
        return mean, var
    if not mean.isfinite().all():
        return _torch_moments(x)
    return _merged_moments(x.view(n, c, m))


def _torch_moments(x):
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    return mean.double(), var.double()


def _merged_moments(x):
    """From the moments of each row, merged: Chan, Golub & LeVeque (1979)."""
    n, c, m = x.shape
    means, variances = [], []
    for block in x.split(max(1, BLOCK // (c * m))):
        _, mean, rstd = torch.native_group_norm(
            block, None, None, len(block), c, m, c, 0.0
        )
        means.append(mean.double())
        variances.append(rstd.double().square_().reciprocal_())
    means, variances = torch.cat(means), torch.cat(variances)
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square_().mean(0)


def _chain(m: int) -> int:
    """The longest part, halved from m, that is not over :data:`CHAIN`."""
    while m > CHAIN and m % 2 == 0:
        m //= 2
    return m


# Rows of contiguous values, one weight to a row


def _rows_forward(x, view, weight, bias, eps):
    n, g, k, m = view
    y, mean, rstd = torch.native_group_norm(
        x.view(n, g, k * m), weight, bias, n, g, k * m, g, eps
    )
    return _shaped(y, x), mean, None, rstd


def _rows_backward(dy, x, view, weight, mean, rstd, needs):
    n, g, k, m = view
    rows = (1, n * g, k * m)
    each = rstd.new_ones(n * g) if weight is None else weight.repeat(n)
    dx, dweight, dbias = _batch_norm_backward(
        dy.reshape(rows),
        x.view(rows),
        each,
        None,
        None,
        mean.view(-1),
        rstd.view(-1),
        True,
        0.0,
        list(needs),
    )
    return (
        _shaped(dx, x) if needs[0] else None,
        dweight.view(n, g).sum(0) if needs[1] else None,
        dbias.view(n, g).sum(0) if needs[2] else None,
    )


# Layer norm and group norm with weights: torch's own kernels


def _layer_forward(x, view, weight, bias, eps):
    n, _, k, _ = view
    y, mean, rstd = torch.native_layer_norm(
        x.view(n, k), (k,), weight, bias, eps
    )
    return _shaped(y, x), mean, None, rstd


def _layer_backward(dy, x, view, weight, mean, rstd, needs):
    n, _, k, _ = view
    dx, dweight, dbias = _layer_norm_backward(
        dy.reshape(n, k),
        x.view(n, k),
        (k,),
        mean,
        rstd,
        weight,
        weight,  # in place of the bias, of which it reads no value
        list(needs),
    )
    return _wanted((_shaped(dx, x), dweight, dbias), needs)


def _groups_forward(x, view, weight, bias, eps):
    n, g, k, m = view
    y, mean, rstd = torch.native_group_norm(
        x.view(n, g * k, m), weight, bias, n, g * k, m, g, eps
    )
    return _shaped(y, x), mean, None, rstd


def _groups_backward(dy, x, view, weight, mean, rstd, needs):
    n, g, k, m = view
    shape = (n, g * k, m)
    dx, dweight, dbias = _group_norm_backward(
        dy.reshape(shape).contiguous(),  # it reads no other strides
        x.view(shape),
        mean,
        rstd,
        weight,
        *(n, g * k, m, g),
        list(needs),
    )
    return _wanted((_shaped(dx, x), dweight, dbias), needs)


# RMS norm


def _rms_forward(x, view, weight, bias, eps):
    n, _, k, _ = view
    x2, y = x.view(n, k), torch.empty_like(x)
    rstd = torch.linalg.vector_norm(x2, 2, 1, keepdim=True)
    rstd = rstd.square_().div_(k).add_(eps).rsqrt_()
    y2 = y.view(n, k)
    for block in _blocks(n, k):
        part = torch.mul(x2[block], rstd[block], out=y2[block])
        if weight is not None:
            part.mul_(weight)
        if bias is not None:
            part.add_(bias)
    return y, None, None, rstd


def _rms_backward(dy, x, view, weight, mean, rstd, needs):
    n, _, k, _ = view
    x2, dy2 = x.view(n, k), dy.reshape(n, k)
    dx = torch.empty_like(x) if needs[0] else None
    zero = torch.zeros_like(rstd)
    bias = x.new_empty(k) if needs[2] else None
    dweight, dbias = 0, 0
    for block in _blocks(n, k):
        dyb = dy2[block]
        dxb, dw, db = _layer_norm_backward(
            dyb,
            x2[block],
            (k,),
            zero[block],
            rstd[block],
            weight,
            bias,
            list(needs),
        )
        if needs[0]:
            # Layer norm's backward has taken rstd * ⟨g⟩ away.
            g = dyb.sum(1) if weight is None else torch.mv(dyb, weight)
            g = g.view(-1, 1).mul_(rstd[block]).div_(k)
            torch.add(dxb, g, out=dx.view(n, k)[block])
        dweight = dweight + dw if needs[1] else None
        dbias = dbias + db if needs[2] else None
    return _wanted((dx, dweight, dbias), needs)


# Channels last, the statistics of a sample


def _last_forward(x, view, weight, bias, eps):
    n, g, k, m = view
    each = [
        torch.batch_norm_update_stats(sample, None, None, 0.0)
        for sample in _last(x, view)
    ]
    means, variances = (
        torch.stack(parts).double().view(n, g, k)
        for parts in zip(*each, strict=True)
    )
    mean = means.mean(2, keepdim=True)
    var = variances.mean(2) + (means - mean).square_().mean(2)
    rstd = (var + eps).rsqrt_().unsqueeze(2)
    scale = rstd.expand(n, g, k)
    if weight is not None:
        scale = scale * weight.view(g, k)
    shift = -mean * scale
    if bias is not None:
        shift += bias.view(g, k)
    scale, shift = (p.to(x.dtype).reshape(n, 1, g * k) for p in (scale, shift))
    y = torch.empty_like(x)
    torch.addcmul(shift, _last(x, view), scale, out=_last(y, view))
    mean, rstd = (p.to(x.dtype).view(n, g) for p in (mean, rstd))
    return y, mean, None, rstd


def _last_backward(dy, x, view, weight, mean, rstd, needs):
    n, g, k, m = view
    dy = dy.contiguous(memory_format=_format(x))
    dx = torch.empty_like(x) if needs[0] else None
    xs, dys = _last(x, view), _last(dy, view)
    one = rstd.new_ones(g * k)
    every = [p.repeat_interleave(k, 1) for p in (mean, rstd)]
    sums = [
        _batch_norm_backward(
            dys[i],
            xs[i],
            one,
            None,
            None,
            every[0][i],
            every[1][i],
            True,
            0.0,
            [False, True, True],
        )[1:]
        for i in range(n)
    ]
    dweights, dbiases = (torch.stack(s) for s in zip(*sums, strict=True))
    if needs[0]:
        _last_dx(
            *(_last(dx, view), dys, xs, view, weight, mean, rstd),
            *(dweights, dbiases),
        )
    return (
        dx,
        dweights.sum(0) if needs[1] else None,
        dbiases.sum(0) if needs[2] else None,
    )


def _last_dx(dx, dy, x, view, weight, mean, rstd, dweights, dbiases):
    """``dx = rstd * weight * dy + slope * x + offset``, sample by sample."""
    n, g, k, m = view
    one = rstd.new_ones(())
    weight = (one if weight is None else weight).double().expand(g * k)
    mean, rstd = (p.double().unsqueeze(2) for p in (mean, rstd))
    gxhat, gmean = (
        (s * weight).view(n, g, k).sum(2, keepdim=True) / (k * m)
        for s in (dweights, dbiases)
    )
    slope = -rstd.square() * gxhat
    offset = -mean * slope - rstd * gmean
    scale = (rstd * weight.view(g, k)).to(x.dtype).view(n, g * k)
    slope, offset = (
        p.to(x.dtype).expand(n, g, k).reshape(n, g * k)
        for p in (slope, offset)
    )
    for i in range(n):
        part = torch.addcmul(offset[i], x[i], slope[i], out=dx[i])
        part.addcmul_(dy[i], scale[i])


# What they share


def _flat(p: Tensor | None) -> Tensor | None:
    return None if p is None else p.reshape(-1)


def _channels_last(x: Tensor) -> bool:
    return x.dim() in (4, 5) and x.movedim(1, -1).is_contiguous()


def _format(x: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}
    return last[x.dim()]


def _last(x: Tensor, view: View) -> Tensor:
    """x with its channels last as (N, M, C)."""
    return x.movedim(1, -1).view(view.N, view.M, view.G * view.K)


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """Give y, freshly computed, the shape of x, and not as a view."""
    return torch.ops.aten._unsafe_view(y, x.shape)


def _blocks(n: int, k: int) -> Iterator[slice]:
    step = max(1, BLOCK // k)
    return (slice(i, i + step) for i in range(0, n, step))


def _wanted(grads, needs):
    return tuple(g if n else None for g, n in zip(grads, needs, strict=True))


_BATCH = _Path(_batch_forward, _batch_backward, 1 << 17)
_ROWS = _Path(_rows_forward, _rows_backward, 1 << 15)
_LAYER = _Path(_layer_forward, _layer_backward, math.inf)
_GROUPS = _Path(_groups_forward, _groups_backward, math.inf)
_RMS = _Path(_rms_forward, _rms_backward, 1 << 15)
_LAST = _Path(_last_forward, _last_backward, 1 << 17)
_BY_SAMPLE = ("instance_norm", "group_norm")
_CONTIGUOUS = {
    "batch_norm": _BATCH,
    "instance_norm": _ROWS,
    "group_norm": _ROWS,
    "layer_norm": _ROWS,
    "rms_norm": _RMS,
}

normalize = partial(fused.normalize, sys.modules[__name__])
"""The work of this backend: these kernels as one step of autograd."""
