"""Fast passes over plain CPU tensors, made of torch's own kernels.

No kernel is new here. Each of torch's norms is slow at something that
another of its kernels does fast, and the one formula says which may stand in
for which:

* Batch norm over images: its pass for the statistics is slow. Its backward,
  given x in the place of dy, sums x and its squares in one reading; then one
  pass of batch norm in evaluation mode.
* Rows of contiguous values that share one weight (instance norm): forward,
  group norm with one group a row; backward, batch norm with one channel a
  row. Layer norm without a weight: torch's own, with a weight of ones.
* Columns (channels last, dense layers, images of few positions): batch norm's
  kernel for columns, on parts that are short enough to keep their digits,
  side by side, so that few long columns are many short ones and fill vectors.
  Their moments merge: over the batch, or over the channels of a group. Where
  torch's own kernel is as fast, it is called first, and its statistics say
  whether it has kept its digits.
* RMS norm: torch composes it of whole passes over memory. Here they run over
  blocks of rows that stay in the cache.

The rest is torch's own kernel. Tensors come without a graph: the autograd
around these passes is in :mod:`normlib.backends.fused`. Where torch's kernel
is only watched, the graph is torch's. Nothing that is passed in is written
to, except for running statistics.

Chapter 5.
"""

import math
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from normlib.axes import View
from normlib.backends import fused

_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default
_group_norm_backward = torch.ops.aten.native_group_norm_backward.default
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default

_DTYPES = (torch.float32, torch.float64)

BLOCK = 2**19
"""Values in a block for each thread, so that a few stay in its cache."""

CHAIN = 2**12
"""The longest sum of squares that is left to float32. Its rounding error
grows with the length: torch's vector norm adds in a few long chains."""

CHAIN_OF_COLUMNS = 2**8
"""The same of sums over columns, each of which is a single chain."""

MANY = 2**7
LARGE = 2**21
"""With so many positions, or without so many values, torch's backward of
batch norm is fast."""

NARROW = 2**6
ROWS = 2**16
"""With rows of fewer bytes, which are no whole vectors, and so many of them,
torch's batch norm of columns is slow: it does each row by itself."""

UNIT = 2**16
"""With fewer values torch's layer norm gains nothing by a weight of ones."""

WATCHED = 2**20
"""With so many values a look at the statistics of torch's kernel, for what
it has lost, takes about a tenth of a forward's time, and less of more."""

CHAIN_OF_TORCH = 2**17
"""The longest sum over a column that is left to float32 where torch's kernel
is only watched. So long, it is wrong in the fourth digit."""

FAR = 16
"""Where a mean is more than so many standard deviations from 0, what float32
loses shows, and torch's own statistics of batch norm, summed in float64, are
taken."""


class _Path(NamedTuple):
    """A way to compute: forward, backward, and what it is worth."""

    forward: Callable
    backward: Callable
    least: float
    """Values in x from which on it pays; infinite where never."""
    fits: Callable = lambda x, view: True
    """Whether, with so many values, it pays for this call."""


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
    with its channels last, more than one value to a statistic; and an
    ordinary call, as :func:`normlib.backends.fused.plain` says.
    """
    dtypes = {p.dtype for p in (x, weight, bias) if p is not None}
    return (
        x.device.type == "cpu"
        and x.numel() > 0
        and view.count(over_batch) > 1
        and len(dtypes) == 1
        and x.dtype in _DTYPES
        and _path(x, view, weight, bias, over_batch, centered) is not None
        and fused.plain(x, weight, bias)
    )


def least(norm: str, x: Tensor, weight: Tensor | None) -> float:
    """How many values a call must have for :func:`pays` to be asked.

    Cheap and by name, because it is asked of calls that gain nothing, too.
    """
    if norm == "evaluation" or x.dtype not in _DTYPES or not x.is_cpu:
        return math.inf
    if norm == "normalize":  # by a view, whichever norm that is
        return 0
    columns = x.dim() == 2 or (x.dim() > 2 and not x.is_contiguous())
    if norm == "batch_norm" and columns:
        return ROWS * x.shape[1] if _odd(x) else WATCHED
    if not x.is_contiguous():
        path = _CHANNELS_LAST.get(norm)
        return math.inf if path is None else path.least
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
    path = _path(x, view, weight, bias, over_batch, centered)
    return path is not None and x.numel() >= path.least and path.fits(x, view)


def forward(
    x: Tensor,
    view: View,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    over_batch: bool,
    centered: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, tuple]:
    """``weight * (x - mean) * rstd + bias`` over the view.

    As :mod:`normlib.backends.fused` asks for it: mean is None where not
    ``centered``, var where not ``over_batch``, and kept are mean and rstd.
    """
    path = _path(x, view, weight, bias, over_batch, centered)
    weight, bias = fused.flat(weight), fused.flat(bias)
    y, mean, var, rstd = path.forward(x, view, weight, bias, eps)
    return y, mean, var, (mean, rstd)


def backward(
    dy: Tensor,
    x: Tensor,
    view: View,
    weight: Tensor | None,
    kept: tuple[Tensor | None, Tensor],
    needs: tuple[bool, bool, bool],
    *,
    over_batch: bool,
    centered: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dx = rstd * (g - ⟨g⟩ - xhat * ⟨g * xhat⟩)`` with ``g = dy * weight``.

    As :mod:`normlib.backends.fused` asks for it.
    """
    if weight is None and any(needs[1:]):  # not saved, or never there
        weight = torch.ones(view.G * view.K, dtype=x.dtype)
    path = _path(x, view, weight, None, over_batch, centered)
    # Not all of torch's kernels see to the layout of dy.
    dy = dy.contiguous(memory_format=fused.layout(x))
    return path.backward(dy, x, view, fused.flat(weight), *kept, needs)


# Torch's own kernels, with something added


def watched_batch_norm(
    x: Tensor,
    running: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor | None:
    """Torch's batch norm by the batch, where it keeps its digits.

    For the dense and for channels last torch's kernel is as fast as any, but
    adds in long chains of float32: at a mean of 100 standard deviations it
    loses a hundred times more than it must.

    Args:
        x: (N, C) or with its channels last; plain, as are the others.
        running: mean and variance, which move; or None.
        weight: (C,), or None.
        bias: (C,), or None.
        momentum: of the running statistics.
        eps: added to the variance.

    Returns:
        y, in torch's own graph. None where a mean is too far from 0, the
        sums are too long, or the channels few; then the running statistics
        are as they were.
    """
    if _odd(x) or not _watched(x):
        return None
    rows = len(x) * math.prod(x.shape[2:])
    if _long(x, rows // torch.get_num_threads()):
        return None
    before = [r.clone() for r in running or ()]
    mine = running or (None, None)
    y, mean, rstd = torch.native_batch_norm(
        x, weight, bias, *mine, True, momentum, eps
    )
    if _modest(mean, rstd, 10):
        return y
    for r, old in zip(running or (), before, strict=True):
        r.data.copy_(old)
    return None


def watched_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor | None:
    """Torch's group norm of channels last, where it keeps its digits.

    It takes E[x^2] - E[x]^2 in float32.

    Args:
        x: (N, C, ...); plain, as are the others.
        num_groups: G, a divisor of C.
        weight: (C,), or None.
        bias: (C,), or None.
        eps: added to the variance.

    Returns:
        y, in torch's own graph. None where a mean is too far from 0 or the
        sums are too long, where x is contiguous, and where the backward
        would be slow (two channels to a group) or wrong (of weight and bias
        alone, in torch 2.13).
    """
    n, c = x.shape[:2]
    positions = math.prod(x.shape[2:])
    if c == num_groups or x.is_contiguous() or not _watched(x):
        return None
    if _long(x, positions):
        return None
    learned = [p for p in (weight, bias) if p is not None and p.requires_grad]
    graph = torch.is_grad_enabled() and bool(learned or x.requires_grad)
    if graph and (c == 2 * num_groups or not x.requires_grad):
        return None
    y, mean, rstd = torch.native_group_norm(
        x, weight, bias, n, c, positions, num_groups, eps
    )
    return y if _modest(mean, rstd, 1) else None


def _watched(x):
    """Whether torch adds in chains here, and a look is worth its time."""
    return (
        x.numel() >= WATCHED
        and x.dtype in _DTYPES
        and (x.dim() == 2 or not x.is_contiguous())
        and fused.layout(x) is not None
    )


def _long(x, chain):
    """Whether a sum over a column loses digits, wherever the mean is."""
    return x.dtype is torch.float32 and chain > CHAIN_OF_TORCH


def unit_weight(x: Tensor, normalized_shape: Sequence[int]) -> Tensor | None:
    """A weight of ones, where torch's layer norm is faster with one.

    That is so in float32, by up to a half.

    Args:
        x: the input.
        normalized_shape: the axes at its end.

    Returns:
        Ones, not to be written to; or None.
    """
    if not isinstance(normalized_shape, Sequence):
        return None
    size = tuple(normalized_shape)
    if (
        torch.compiler.is_compiling()
        or type(x) not in fused.TENSORS
        or x.numel() < UNIT
        or x.dtype is not torch.float32
        or not x.is_cpu
        or tuple(x.shape[-len(size) :]) != size
        or not fused.plain(x)
    ):
        return None
    return _ones(size)


@lru_cache(maxsize=32)
def _ones(size):
    with torch.inference_mode(False):
        return torch.ones(size, device="cpu", dtype=torch.float32)


def _path(x, view, weight, bias, over_batch, centered) -> _Path | None:
    contiguous = x.is_contiguous()
    if not contiguous and fused.layout(x) is None:
        return None
    # Not trailing axes that happen to hold as many values.
    channels = x.dim() > 1 and x.shape[:2] == (view.N, view.G * view.K)
    if over_batch:
        if not centered or not channels or view.K > 1:
            return None
        return _PLANES if contiguous and not _few(view) else _BATCH_COLUMNS
    if not contiguous:
        return _COLUMNS if centered and channels else None
    one_each = view.M == 1 and view.G == 1
    if not centered:
        return _RMS if one_each and bias is None else None
    if view.K == 1 or (weight is None and bias is None):
        return _ROWS
    return _LAYER if one_each else _GROUPS


def _few(view):
    """Whether each position is better seen as a channel of its own.

    Rows of so few values are too short for a kernel over rows.
    """
    return view.M < 8 or (view.M <= 32 and view.G * view.M <= 4096)


# Batch norm over planes of positions


def _planes_forward(x, view, weight, bias, eps):
    mean, var = _planes_moments(x, view)
    rstd = (var + eps).rsqrt_()
    mean, var, rstd = torch.stack((mean, var, rstd)).to(x.dtype)
    y, _, _ = torch.native_batch_norm(
        x, weight, bias, mean, var, False, 0.0, eps
    )
    return y, mean, var, rstd


def _planes_moments(x, view):
    """The mean and the biased variance of each channel, in float64."""
    n, c, _, m = view
    length = _part(m, CHAIN // 8)
    if length <= CHAIN:
        # With dy = x and xhat = x these are what a variance is made of.
        rows = x.view(1, -1, length)
        zeros, ones = x.new_zeros(len(rows[0])), x.new_ones(len(rows[0]))
        found = torch.stack(_sums(rows, rows, zeros, ones))
        found = found.view(2, n, c, -1).sum((1, 3), dtype=torch.float64)
        square, mean = found.div_(n * m)
        var = torch.addcmul(square, mean, mean, value=-1)
        # A mean away from 0 has eaten the digits of the difference.
        if _near(mean, var, 3):
            return mean, var
    mean, var = _merged(*_row_moments(x.view(n, c, m)), 0)
    return (mean, var) if _near(mean, var, FAR) else _torch_moments(x)


def _row_moments(x):
    _, c, m = x.shape
    found = [
        torch.native_group_norm(part, None, None, len(part), c, m, c, 0.0)
        for part in x.split(_step(x))
    ]
    _, mean, rstd = zip(*found, strict=True)
    return torch.cat(mean).double(), torch.cat(rstd).double().pow(-2)


def _torch_moments(x):
    found = torch.batch_norm_update_stats(x, None, None, 0.0)
    return [p.double() for p in found]


def _planes_backward(dy, x, view, weight, mean, rstd, needs):
    n, c, _, m = view
    if m >= MANY or x.numel() < LARGE:
        return _torch_batch_backward(dy, x, view, weight, mean, rstd, needs)
    rows = (1, n * c, m)
    each = torch.stack((mean, rstd)).repeat(1, n)
    sums = _sums(dy.view(rows), x.view(rows), *each)
    sums = [s.view(n, c).sum(0) for s in sums]
    dx = None
    if needs[0]:
        line = _line(view, weight, mean, rstd, *sums, n * m)
        scale, slope, offset = (p.view(c) for p in line)
        zeros = torch.zeros_like(rstd)
        # Batch norm in evaluation: slope * x + offset.
        dx, _, _ = torch.native_batch_norm(
            *(x, slope, offset, zeros, zeros + 1, False, 0.0, 0.0)
        )
        planes = dx.view(n, c, m)
        parts = planes, dy.view(n, c, m), scale.view(c, 1)
        torch.addcmul(*parts, out=planes)
    return _wanted((dx, *sums), needs)


# Columns: the channels last, or so few positions that each is a channel


def _columns(x, view, over_batch):
    """See x as (instances, rows, columns); a column is of one channel."""
    n, g, k, m = view
    if not x.is_contiguous():
        x = x.movedim(1, -1).view(n, m, g * k)
        return x.view(1, n * m, g * k) if over_batch else x
    return x.view(1, n, g * k * m)


def _torch_is_fast(x, view):
    """Whether torch's batch norm has a fast kernel for these columns."""
    return (view.M == 1 or not x.is_contiguous()) and not _narrow(x, view)


def _narrow(x, view):
    """Whether they are few and long."""
    return _odd(x) and view.N * view.M >= ROWS


def _odd(x):
    """Whether the channels of a row are few, and no whole vectors."""
    width = x.shape[1] * x.element_size()
    return width < NARROW and width % 32 > 0


def _columns_forward(x, view, weight, bias, eps, *, over_batch):
    # Torch's forward is fast, its backward is not.
    if view.K == 2 and not _long(x, view.M):
        n, g, k, m = view
        y, mean, rstd = torch.native_group_norm(
            x, weight, bias, n, g * k, m, g, eps
        )
        if _modest(mean, rstd, 1):
            return y, mean, None, rstd
    return _exact_forward(x, view, weight, bias, eps, over_batch)


def _exact_forward(x, view, weight, bias, eps, over_batch):
    seen = _columns(x, view, over_batch)
    shape = (len(seen), view.G, view.K, -1)
    found = _column_moments(seen)
    mean, var = _merged(*(p.view(shape) for p in found), (2, 3))
    if not _near(mean, var, FAR):
        shift = _to_columns(mean.to(x.dtype).unsqueeze(2), seen, view)
        rest, var = _column_moments(seen - shift)
        rest, var = _merged(rest.view(shape), var.view(shape), (2, 3))
        # Of infinite values the mean stays infinite.
        mean = mean.to(x.dtype) + rest.nan_to_num(0.0)
    rstd = (var + eps).rsqrt()
    scale = rstd.unsqueeze(2).expand(-1, -1, view.K)
    if weight is not None:
        scale = scale * weight.view(view.G, view.K)
    scale = scale.to(x.dtype)
    # From the rounded scale, so that its rounding does not move the mean.
    shift = -mean.unsqueeze(2) * scale
    if bias is not None:
        shift += bias.view(view.G, view.K)
    scale, shift = (_to_columns(p, seen, view) for p in (scale, shift))
    y = torch.empty_like(x)
    torch.addcmul(shift, seen, scale, out=_columns(y, view, over_batch))
    stats = (mean, var, rstd)
    shape = (view.G,) if over_batch else (view.N, view.G)
    mean, var, rstd = (p.to(x.dtype).view(shape) for p in stats)
    return y, mean, var if over_batch else None, rstd


def _columns_backward(dy, x, view, weight, mean, rstd, needs, *, over_batch):
    fast = _torch_is_fast(x, view) and (over_batch or view.K > 2)
    whole = x.is_contiguous() and view.M % 16 == 0  # vectors of positions
    if whole or (fast and _modest(mean, rstd, 1)):
        back = _torch_batch_backward if over_batch else _torch_group_backward
    else:
        back = partial(_exact_backward, over_batch=over_batch)
    return back(dy, x, view, weight, mean, rstd, needs)


def _torch_batch_backward(dy, x, view, weight, mean, rstd, needs):
    if weight is None:
        weight = torch.ones_like(rstd)
    grads = _batch_norm_backward(
        dy, x, weight, None, None, mean, rstd, True, 0.0, list(needs)
    )
    return _wanted(grads, needs)


def _torch_group_backward(dy, x, view, weight, mean, rstd, needs):
    n, g, k, m = view
    grads = _group_norm_backward(
        # Without dx it writes where nothing is (seen in 2.13).
        *(dy, x, mean, rstd, weight, n, g * k, m, g),
        [True, *needs[1:]],
    )
    return _wanted(grads, needs)


def _exact_backward(dy, x, view, weight, mean, rstd, needs, over_batch):
    dys, xs = (_columns(t, view, over_batch) for t in (dy, x))
    each = (
        _to_columns(p.view(-1, view.G, 1), xs, view).squeeze(1)
        for p in (mean, rstd)
    )
    # Images of few positions come in batches that are no longer.
    chain = CHAIN_OF_COLUMNS // (4 if x.is_contiguous() else 1)
    sums = _column_sums(dys, xs, *each, chain)
    sums = [s.view(len(xs), view.G * view.K, -1).sum(2) for s in sums]
    dx = None
    if needs[0]:
        dx = torch.empty_like(x)
        count = view.count(over_batch)
        line = _line(view, weight, mean, rstd, *sums, count)
        line = (_to_columns(p, xs, view) for p in line)
        _combine(_columns(dx, view, over_batch), dys, xs, *line)
    return _wanted((dx, *(s.sum(0).to(x.dtype) for s in sums)), needs)


def _to_columns(p, seen, view):
    """(N, G, K) or (N, G, 1), repeated and cast for the columns of each."""
    each = seen.shape[2] // (view.G * view.K)
    shape = (len(p), view.G, view.K, each)
    p = p.to(seen.dtype).unsqueeze(3).expand(shape).contiguous()
    return p.view(len(p), 1, seen.shape[2])


def _column_moments(x):
    """The moments over the second axis of (N, rows, columns), in float64."""
    n, rows, columns = x.shape
    parts = _parts(rows, CHAIN_OF_COLUMNS)
    head = rows // parts * parts
    found = _stacked(x[:, :head].unflatten(1, (-1, parts)).flatten(2))
    mean, var = _merged(*(p.view(n, parts, columns) for p in found), 1)
    if head == rows:
        return mean, var
    rest_mean, rest_var = _stacked(x[:, head:])
    a, b = head / rows, (rows - head) / rows
    between = (mean - rest_mean).square_().mul_(a * b)
    return a * mean + b * rest_mean, a * var + b * rest_var + between


def _stacked(x):
    found = [torch.batch_norm_update_stats(s, None, None, 0.0) for s in x]
    return [torch.stack(p).double() for p in zip(*found, strict=True)]


def _column_sums(dy, x, mean, rstd, chain):
    """The sums of dy * xhat and of dy over the second axis, (N, columns)."""
    n, rows, columns = x.shape
    parts = _parts(rows, chain)
    head = rows // parts * parts
    each = [p.repeat(1, parts) for p in (mean, rstd)]
    cut = (t[:, :head].unflatten(1, (-1, parts)).flatten(2) for t in (dy, x))
    sums = [s.view(n, parts, columns).sum(1) for s in _each_sums(*cut, *each)]
    if head < rows:
        rest = _each_sums(dy[:, head:], x[:, head:], mean, rstd)
        sums = [s + r for s, r in zip(sums, rest, strict=True)]
    return sums


def _each_sums(*parts):
    found = [_sums(*part) for part in zip(*parts, strict=True)]
    return [torch.stack(p) for p in zip(*found, strict=True)]


def _parts(rows, chain):
    """How many parts make sums of about that length.

    Parts of one size, if there are such; else some rows are left over.
    """
    least = max(1, rows // chain)
    near = range(least, least + 16)
    return next((parts for parts in near if rows % parts == 0), least)


# Rows of contiguous values, one weight to a row


def _rows_forward(x, view, weight, bias, eps):
    n, g, k, m = view
    y, mean, rstd = torch.native_group_norm(
        x.view(n, g, k * m), weight, bias, n, g, k * m, g, eps
    )
    # Only instance norm: torch's layer and group norm sum in float32 too.
    if k == 1 and not _modest(mean, rstd, FAR):
        del y
        parts = (None if p is None else p.repeat(n) for p in (weight, bias))
        y, mean, rstd = torch.native_batch_norm(
            x.view(1, n * g, m), *parts, None, None, True, 0.0, eps
        )
        mean, rstd = mean.view(n, g), rstd.view(n, g)
    return _shaped(y, x), mean, None, rstd


def _rows_backward(dy, x, view, weight, mean, rstd, needs):
    n, g, k, m = view
    if m == 1:  # layer norm, whose own kernel needs less memory
        return _layer_backward(dy, x, view, None, mean, rstd, needs)
    rows = (1, n * g, k * m)
    each = rstd.new_ones(n * g) if weight is None else weight.repeat(n)
    dx, dweight, dbias = _batch_norm_backward(
        dy.view(rows),
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
    rows, length = view.N * view.G, view.K * view.M
    dx, dweight, dbias = _layer_norm_backward(
        dy.view(rows, length),
        x.view(rows, length),
        (length,),
        mean.view(-1, 1),
        rstd.view(-1, 1),
        weight,
        weight,  # in place of the bias, of which it reads no value
        list(needs),
    )
    dx = _shaped(dx, x) if needs[0] else None
    return _wanted((dx, dweight, dbias), needs)


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
        dy.view(shape),
        x.view(shape),
        mean,
        rstd,
        weight,
        *(n, g * k, m, g),
        list(needs),
    )
    dx = _shaped(dx, x) if needs[0] else None
    return _wanted((dx, dweight, dbias), needs)


# RMS norm, in blocks of rows that stay in the cache


def _rms_forward(x, view, weight, bias, eps):
    n, _, k, _ = view
    y, rstd = torch.empty_like(x), x.new_empty(n, 1)
    eps, length = x.new_full((), eps), _part(k, CHAIN // 4)
    step = _step(rstd, k)
    parts = (t.split(step) for t in (x.view(n, k), y.view(n, k), rstd))
    for rows, ys, r in zip(*parts, strict=True):
        xs = rows
        if length < k:
            xs = xs.view(-1, k // length, length)
            xs = torch.linalg.vector_norm(xs, 2, 2)
        torch.linalg.vector_norm(xs, 2, 1, keepdim=True, out=r)
        torch.addcmul(eps, r, r, value=1 / k, out=r).rsqrt_()
        torch.mul(rows, r, out=ys)
        if weight is not None:
            ys.mul_(weight)
    return y, None, None, rstd


def _rms_backward(dy, x, view, weight, mean, rstd, needs):
    n, _, k, _ = view
    dx = torch.empty_like(x) if needs[0] else None
    dweight = rstd.new_zeros(k) if needs[1] else None
    step = _step(rstd, k)
    # A block of its own, so that dx is written once and not read again.
    room = x.new_empty(min(n, step), k)
    blocks = (t.view(n, -1).split(step) for t in (dy, x, rstd))
    for i, (dys, xs, r) in enumerate(zip(*blocks, strict=True)):
        block = room[: len(xs)]
        product = torch.mul(dys, xs, out=block)
        if needs[0]:
            gx = _row_products(product, weight)
        if needs[1]:
            dweight += _column_totals(product.mul_(r))
        if needs[0]:
            share = (gx.view(-1, 1) * r).mul_(r).div_(-k)
            g = dys if weight is None else torch.mul(dys, weight, out=block)
            torch.addcmul(g, xs, share, out=block)
            rows = slice(i * step, i * step + len(xs))
            torch.mul(block, r, out=dx.view(n, k)[rows])
    return _wanted((dx, dweight, None), needs)


def _row_products(block, weight):
    """Of each row the sum, or the product with the weight.

    Every operation on a block gives a thread the same rows. Else, where two
    cores have no cache in common, what one has read the other must take back
    before it can write.
    """
    if weight is None:
        return block.sum(1)
    mine = _by_threads(block)
    return torch.bmm(mine, weight.expand(len(mine), 1, -1).mT).view(-1)


def _column_totals(block):
    """The sum of the rows, each thread its own first."""
    return _by_threads(block).sum(1).sum(0)


def _by_threads(block):
    threads = torch.get_num_threads()
    even = len(block) % threads == 0
    return block.view(threads if even else 1, -1, block.shape[1])


# What they share


def _sums(dy, x, mean, rstd):
    """The sums of dy * xhat and of dy over each channel, as batch norm's."""
    return _batch_norm_backward(
        *(dy, x, None, None, None, mean, rstd),
        *(True, 0.0, [False, True, True]),
    )[1:]


def _line(view, weight, mean, rstd, dweight, dbias, count):
    """The backward as ``dx = scale * dy + slope * x + offset``.

    Returns:
        The three, of shape (N, G, K), or (1, G, K) where the statistics run
        over the batch.
    """
    _, g, k, _ = view
    dtype = rstd.dtype
    weight = rstd.new_ones(g * k) if weight is None else weight
    weight = weight.double().view(g, k)
    mean, rstd, gxhat, gmean = (
        p.double().view(-1, g, p.shape[-1] // g)
        for p in (mean, rstd, dweight, dbias)
    )
    scale = rstd * weight
    if k == 1:
        gxhat, gmean = gxhat * scale, gmean * scale
    else:
        gxhat, gmean = (
            (s * weight).sum(2, keepdim=True).mul_(rstd)
            for s in (gxhat, gmean)
        )
    # Rounded now, so that its rounding does not move the mean.
    slope = (gxhat * rstd).div_(-count).to(dtype)
    offset = torch.addcmul(gmean.div_(-count), mean, slope, value=-1)
    line = (scale, slope, offset)
    return [p.to(dtype).expand(scale.shape) for p in line]


def _combine(dx, dy, x, scale, slope, offset):
    """Write scale * dy + slope * x + offset to dx, in blocks."""
    step = _step(x)
    line = (p.expand(len(x), *p.shape[1:]) for p in (scale, slope, offset))
    parts = (t.split(step) for t in (dx, dy, x, *line))
    for out, dys, xs, a, b, c in zip(*parts, strict=True):
        torch.addcmul(c, xs, b, out=out).addcmul_(dys, a)


def _step(x, size=None):
    """How many of the first axis, each of a size, make a block.

    As many for one thread as for another.
    """
    size = x[0].numel() if size is None else size
    return max(1, BLOCK // size * torch.get_num_threads())


def _near(mean, var, limit):
    """Whether no mean is that many standard deviations from 0; NaN is not."""
    rest = torch.addcmul(var, mean, mean, value=-(limit**-2))
    return rest.min().item() >= 0.0


def _modest(mean, rstd, limit):
    """The same, by the inverse of the standard deviation."""
    return torch.linalg.vector_norm(mean * rstd, math.inf).item() <= limit


def _merged(mean, var, axes):
    """Chan, Golub & LeVeque (1979), for parts of one size."""
    merged = mean.mean(axes, keepdim=True)
    var = var.mean(axes) + (mean - merged).square_().mean(axes)
    return merged.view(var.shape), var


def _part(size, limit):
    """The longest part, halved from a size, that is within a limit."""
    while size > limit and size % 2 == 0:
        size //= 2
    return size


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """Give y, freshly computed, the shape of x, and not as a view."""
    same = y.shape == x.shape
    return y if same else torch.ops.aten._unsafe_view(y, x.shape)


def _wanted(grads, needs):
    return tuple(g if n else None for g, n in zip(grads, needs, strict=True))


_PLANES = _Path(_planes_forward, _planes_backward, 2**19)
_BATCH_COLUMNS = _Path(
    partial(_columns_forward, over_batch=True),
    partial(_columns_backward, over_batch=True),
    ROWS,
    # What torch's kernel is fast for comes here where it loses digits.
    lambda x, view: (
        _narrow(x, view)
        or (x.numel() >= 2**19 and (_torch_is_fast(x, view) or view.N >= 32))
    ),
)
_COLUMNS = _Path(
    partial(_columns_forward, over_batch=False),
    partial(_columns_backward, over_batch=False),
    2**19,
    lambda x, view: view.K == 1 or x.numel() >= 2**20,
)
_ROWS = _Path(
    _rows_forward,
    _rows_backward,
    2**18,
    lambda x, view: (
        view.K * view.M >= 32
        and 1 in (view.K, view.M)
        and (view.K == 1 or x.numel() >= 2**19)
    ),
)
_LAYER = _Path(_layer_forward, _layer_backward, math.inf)
_GROUPS = _Path(_groups_forward, _groups_backward, math.inf)
_RMS = _Path(_rms_forward, _rms_backward, 2**19)
_CONTIGUOUS = {
    "batch_norm": _PLANES,
    "instance_norm": _ROWS,
    "group_norm": _ROWS,
    "layer_norm": _LAYER,
    "rms_norm": _RMS,
}
_CHANNELS_LAST = {
    "instance_norm": _COLUMNS,
    "group_norm": _COLUMNS,
}

normalize = partial(fused.normalize, sys.modules[__name__])
"""The work of this backend: these kernels as one step of autograd."""
