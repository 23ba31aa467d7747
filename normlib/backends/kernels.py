"""The Triton kernels: rows, and channels.

Two families serve every norm. A *row* is one set of values that share a mean,
next to each other in memory, and short enough to be held by one program: it
is read once, and its mean and variance are taken in two passes over
registers. Layer norm and RMS norm have a weight for each column
(``trailing``); group and instance norm have one for each plane of positions
(``planes``).

Where the values of a statistic are spread over memory (batch norm, channels
last) or too many, each program takes the mean and the squared deviations of a
part of each *channel*, and the parts are merged as
:meth:`normlib.stats.Moments.merge` does: Chan, Golub & LeVeque (1979).

All arithmetic is in float32. There are no atomics: partial sums are written
and added up by a second kernel, so that a run repeats to the last bit.
Offsets are 64 bits wide where they multiply a row. A pointer that is None is
a constant of the compilation: what is asked of it costs nothing later.
The loops over memory have STAGES: while one block is worked on, the next ones
are on their way.

Imported only where Triton is; ``normlib.backends.triton`` calls it.
Chapter 10.
"""

import triton
import triton.language as tl

# Rows with a weight for each column: layer norm, RMS norm


@triton.jit
def trailing_forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    total_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    columns,
    eps,
    CENTERED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalize ROWS rows, each of at most BLOCK columns.

    With a residual, the rows of x + residual, which go to the total.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    start = row.to(tl.int64) * columns
    at = start + column
    x = _read(x_ptr, residual_ptr, at, inside)
    if residual_ptr is not None:
        tl.store(total_ptr + at, x.to(total_ptr.dtype.element_ty), mask=inside)
    if CENTERED:
        x = _from_first(x, x_ptr, residual_ptr, start, row < rows)
        x = tl.where(inside, x, 0.0)
        mean = tl.sum(x, 1, keep_dims=True) / columns
        x = tl.where(inside, x - mean, 0.0)
        tl.store(mean_ptr + row, mean, mask=row < rows)
    var = tl.sum(x * x, 1, keep_dims=True) / columns
    rstd = 1.0 / tl.sqrt(var + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    weight, bias = _parameters(weight_ptr, bias_ptr, column, column < columns)
    y = _activate(x * rstd * weight + bias, ACTIVATION)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def trailing_backward(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dtotal_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    rows,
    columns,
    CENTERED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program takes every so many-th block of rows.

    What it adds to dweight and dbias stays in registers until its last row,
    and then is one row of the partial sums (programs, columns).
    """
    column = tl.arange(0, BLOCK)[None, :]
    weight, bias = _parameters(weight_ptr, bias_ptr, column, column < columns)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    step = tl.num_programs(0) * ROWS
    begin = tl.program_id(0) * ROWS
    for first in tl.range(begin, rows, step, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < columns)
        start = row.to(tl.int64) * columns
        at = start + column
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = _read(x_ptr, None, at, inside)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        if CENTERED:
            mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
            x = _from_first(x, x_ptr, None, start, row < rows) - mean
            x = tl.where(inside, x, 0.0)
        xhat = x * rstd
        dy = _through(dy, xhat * weight + bias, ACTIVATION)
        if dweight_ptr is not None:
            dweight += dy * xhat
        if dbias_ptr is not None:
            dbias += dy
        if dx_ptr is not None:
            g = dy * weight
            dx = g - xhat * (tl.sum(g * xhat, 1, keep_dims=True) / columns)
            if CENTERED:
                dx -= tl.sum(g, 1, keep_dims=True) / columns
            dx = dx * rstd
            if dtotal_ptr is not None:
                dx += tl.load(dtotal_ptr + at, mask=inside, other=0.0)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    part = tl.program_id(0).to(tl.int64) * columns + tl.arange(0, BLOCK)
    here = tl.arange(0, BLOCK) < columns
    if dweight_ptr is not None:
        tl.store(dweight_ptr + part, tl.sum(dweight, 0), mask=here)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + part, tl.sum(dbias, 0), mask=here)


@triton.jit
def long_forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    total_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    columns,
    eps,
    CENTERED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row in blocks: merge their moments, then read them again."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * columns
    y_ptr += row * columns
    if residual_ptr is not None:
        residual_ptr += row * columns
        total_ptr += row * columns
    count = 0.0
    mean = 0.0
    m2 = 0.0
    start = 0.0
    if CENTERED:
        start = _read(x_ptr, residual_ptr, 0, True)
    for first in tl.range(0, columns, BLOCK, num_stages=STAGES):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        x = _read(x_ptr, residual_ptr, column, inside)
        if residual_ptr is not None:
            total = x.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + column, total, mask=inside)
        x = tl.where(inside, x - start, 0.0)
        size = tl.minimum(columns - first, BLOCK).to(tl.float32)
        here = 0.0
        if CENTERED:
            here = tl.sum(x, 0) / size
            x = tl.where(inside, x - here, 0.0)
        share = size / (count + size)
        delta = here - mean
        m2 += tl.sum(x * x, 0) + delta * delta * (count * share)
        mean += delta * share
        count += size
    rstd = 1.0 / tl.sqrt(m2 / columns + eps)
    tl.store(rstd_ptr + row, rstd)
    if CENTERED:
        tl.store(mean_ptr + row, mean)
    for first in tl.range(0, columns, BLOCK, num_stages=STAGES):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        x = _read(x_ptr, residual_ptr, column, inside)
        weight, bias = _parameters(weight_ptr, bias_ptr, column, inside)
        y = (x - start - mean) * rstd * weight + bias
        y = _activate(y, ACTIVATION)
        tl.store(y_ptr + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def long_backward(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dtotal_ptr,
    dx_ptr,
    columns,
    CENTERED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Dx of one row in blocks: its two sums, then the row again."""
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * columns
    x_ptr += row * columns
    dx_ptr += row * columns
    if dtotal_ptr is not None:
        dtotal_ptr += row * columns
    rstd = tl.load(rstd_ptr + row)
    start = 0.0
    mean = 0.0
    if CENTERED:
        start = _read(x_ptr, None, 0, True)
        mean = tl.load(mean_ptr + row)
    g_sum = tl.zeros((BLOCK,), tl.float32)
    gxhat_sum = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, columns, BLOCK, num_stages=STAGES):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        dy = tl.load(dy_ptr + column, mask=inside, other=0.0).to(tl.float32)
        x = _read(x_ptr, None, column, inside)
        xhat = (x - start - mean) * rstd
        weight, bias = _parameters(weight_ptr, bias_ptr, column, inside)
        g = _through(dy, xhat * weight + bias, ACTIVATION) * weight
        g_sum += g
        gxhat_sum += g * xhat
    g_mean = tl.sum(g_sum, 0) / columns
    gxhat_mean = tl.sum(gxhat_sum, 0) / columns
    for first in tl.range(0, columns, BLOCK, num_stages=STAGES):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        dy = tl.load(dy_ptr + column, mask=inside, other=0.0).to(tl.float32)
        x = _read(x_ptr, None, column, inside)
        xhat = (x - start - mean) * rstd
        weight, bias = _parameters(weight_ptr, bias_ptr, column, inside)
        g = _through(dy, xhat * weight + bias, ACTIVATION) * weight
        dx = g - xhat * gxhat_mean
        if CENTERED:
            dx -= g_mean
        dx = dx * rstd
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + column, mask=inside, other=0.0)
        tl.store(dx_ptr + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def long_sums(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dweight_ptr,
    dbias_ptr,
    rows,
    columns,
    CENTERED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums over rows of dy * xhat and dy, (programs, columns)."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    weight, bias = _parameters(weight_ptr, bias_ptr, column, column < columns)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    step = tl.num_programs(1) * ROWS
    begin = tl.program_id(1) * ROWS
    for first in tl.range(begin, rows, step, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < columns)
        start = row.to(tl.int64) * columns
        at = start + column
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = _read(x_ptr, None, at, inside)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        if CENTERED:
            x = _from_first(x, x_ptr, None, start, row < rows)
            x -= tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        xhat = x * rstd
        dy = _through(dy, xhat * weight + bias, ACTIVATION)
        dweight += dy * xhat
        dbias += dy
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1).to(tl.int64) * columns + column
    tl.store(dweight_ptr + part, tl.sum(dweight, 0), mask=column < columns)
    tl.store(dbias_ptr + part, tl.sum(dbias, 0), mask=column < columns)


@triton.jit
def add_parts(
    first_ptr,
    second_ptr,
    first_sum_ptr,
    second_sum_ptr,
    parts,
    columns,
    TWO: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add partial sums (parts, columns) up; one array of them, or two."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    first = tl.zeros((PARTS, BLOCK), tl.float32)
    second = tl.zeros((PARTS, BLOCK), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        inside = (part < parts) & (column < columns)
        at = part.to(tl.int64) * columns + column
        first += tl.load(first_ptr + at, mask=inside, other=0.0)
        if TWO:
            second += tl.load(second_ptr + at, mask=inside, other=0.0)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    element = first_sum_ptr.dtype.element_ty
    tl.store(first_sum_ptr + column, tl.sum(first, 0).to(element), mask=inside)
    if TWO:
        element = second_sum_ptr.dtype.element_ty
        total = tl.sum(second, 0).to(element)
        tl.store(second_sum_ptr + column, total, mask=inside)


# Rows with a weight for each plane: group norm, instance norm


@triton.jit
def planes_forward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    groups,
    channels,
    positions,
    eps,
    CENTERED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Normalize ROWS rows (n, g), each of K channels with M positions."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    channel = tl.arange(0, CHANNELS)[None, :, None]
    position = tl.arange(0, POSITIONS)[None, None, :]
    known = (row < rows) & (channel < channels)
    inside = known & (position < positions)
    size = channels * positions
    start = row.to(tl.int64) * size
    at = start + channel * positions + position
    x = _read(x_ptr, None, at, inside)
    if CENTERED:
        x = _from_first(x, x_ptr, None, start, row < rows)
        x = tl.where(inside, x, 0.0)
        mean = _total(x) / size
        x = tl.where(inside, x - mean, 0.0)
        tl.store(mean_ptr + row, mean, mask=row < rows)
    rstd = 1.0 / tl.sqrt(_total(x * x) / size + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    which = (row % groups) * channels + channel
    weight, bias = _parameters(weight_ptr, bias_ptr, which, known)
    y = _activate(x * rstd * weight + bias, ACTIVATION)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def planes_backward(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    rows,
    groups,
    channels,
    positions,
    CENTERED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Dx of ROWS rows, and each channel's share in dweight and dbias."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    channel = tl.arange(0, CHANNELS)[None, :, None]
    position = tl.arange(0, POSITIONS)[None, None, :]
    known = (row < rows) & (channel < channels)
    inside = known & (position < positions)
    size = channels * positions
    start = row.to(tl.int64) * size
    at = start + channel * positions + position
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = _read(x_ptr, None, at, inside)
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    if CENTERED:
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        x = _from_first(x, x_ptr, None, start, row < rows) - mean
        x = tl.where(inside, x, 0.0)
    xhat = x * rstd
    which = (row % groups) * channels + channel
    weight, bias = _parameters(weight_ptr, bias_ptr, which, known)
    dy = _through(dy, xhat * weight + bias, ACTIVATION)
    if dweight_ptr is not None:
        of = row.to(tl.int64) * channels + channel
        share = tl.sum(dy * xhat, 2, keep_dims=True)
        tl.store(dweight_ptr + of, share, mask=known)
        share = tl.sum(dy, 2, keep_dims=True)
        tl.store(dbias_ptr + of, share, mask=known)
    if dx_ptr is not None:
        g = dy * weight
        dx = g - xhat * (_total(g * xhat) / size)
        if CENTERED:
            dx -= _total(g) / size
        dx = (dx * rstd).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + at, dx, mask=inside)


# What the rows share, and the channels below


@triton.jit
def _read(x_ptr, residual_ptr, at, mask):
    """Values of x in float32; or of x + residual, rounded as x is."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _from_first(x, x_ptr, residual_ptr, start, known):
    """Values less the first of theirs, which is exact enough to be free.

    What is left is small where the mean is large, so that its mean keeps the
    digits that a mean in float32 would round off.
    """
    return x - _read(x_ptr, residual_ptr, start, known)


@triton.jit
def _parameters(weight_ptr, bias_ptr, at, mask):
    """Weight and bias in float32; 1 and 0 where there are none."""
    weight = 1.0
    bias = 0.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return weight, bias


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """The activation of z; z itself where there is none."""
    y = z
    if ACTIVATION == "relu":
        y = tl.where(z <= 0.0, 0.0, z)  # not the maximum, which drops NaN
    if ACTIVATION == "silu":
        y = z * _sigmoid(z)
    return y


@triton.jit
def _through(dy, z, ACTIVATION: tl.constexpr):
    """The gradient with respect to z, given that of its activation."""
    dz = dy
    if ACTIVATION == "relu":
        dz = tl.where(z <= 0.0, 0.0, dy)
    if ACTIVATION == "silu":
        sigmoid = _sigmoid(z)
        dz = dy * sigmoid * (1.0 + z * (1.0 - sigmoid))
    return dz


@triton.jit
def _sigmoid(z):
    """``1 / (1 + exp(-z))`` by an exponential that does not overflow."""
    small = tl.exp(-tl.abs(z))
    return tl.where(z >= 0.0, 1.0, small) / (1.0 + small)


@triton.jit
def _total(x):
    """Sum over the channels and positions of each row."""
    return tl.sum(tl.sum(x, 2, keep_dims=True), 1, keep_dims=True)


# Channels: values of a statistic that are spread over memory


@triton.jit
def _first_of(x_ptr, channel, known, width, channel_stride):
    """The first value of each channel's group; see :func:`_from_first`."""
    at = (channel // width * width).to(tl.int64) * channel_stride
    return tl.load(x_ptr + at, mask=known, other=0.0).to(tl.float32)


@triton.jit
def _middle(x_ptr, mean_ptr, group, channel, known, width, channel_stride):
    """That value, and the group's mean less it; 0 where there is no mean."""
    start = 0.0
    mean = 0.0
    if mean_ptr is not None:
        start = _first_of(x_ptr, channel, known, width, channel_stride)
        mean = tl.load(mean_ptr + group, mask=known, other=0.0)
    return start, mean


@triton.jit
def _place(
    base,
    block,
    lane,
    known,
    inner,
    outer_stride,
    inner_stride,
    INNER: tl.constexpr,
):
    """Where the values of a block are, and which of them exist.

    The first one of each channel is at ``base``.
    """
    blocks = tl.cdiv(inner, INNER)
    i = (block % blocks) * INNER + lane
    outer = (block // blocks).to(tl.int64)
    at = base + outer * outer_stride + i.to(tl.int64) * inner_stride
    return at, known & (i < inner)


@triton.jit
def channel_moments(
    x_ptr,
    count_ptr,
    mean_ptr,
    m2_ptr,
    channels,
    groups,
    outer,
    inner,
    instance_stride,
    outer_stride,
    inner_stride,
    channel_stride,
    per_split,
    CENTERED: tl.constexpr,
    UNIFORM: tl.constexpr,
    STAGES: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Count, mean and squared deviations of a part of each channel.

    A program takes CHANNELS channels of one instance (or of all), and of
    their values a run of blocks of INNER. Each lane goes on by Welford's
    step; at the end the lanes are merged.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    lane = tl.arange(0, INNER)[None, :]
    split = tl.program_id(1)
    instance = tl.program_id(2).to(tl.int64)
    known = channel < channels
    width = channels // groups
    base = instance * instance_stride
    start = _first_of(x_ptr + base, channel, known, width, channel_stride)
    base = base + channel.to(tl.int64) * channel_stride
    first = split * per_split
    last = tl.minimum(first + per_split, outer * tl.cdiv(inner, INNER))
    count = tl.zeros((CHANNELS, INNER), tl.float32)
    mean = tl.zeros((CHANNELS, INNER), tl.float32)
    m2 = tl.zeros((CHANNELS, INNER), tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        at, inside = _place(
            base, block, lane, known, inner, outer_stride, inner_stride, INNER
        )
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        count += inside.to(tl.float32)
        if CENTERED:
            delta = x - start - mean
            if UNIFORM:  # the lanes that are inside have all seen as many
                share = 1.0 / (block - first + 1).to(tl.float32)
                mean += tl.where(inside, delta * share, 0.0)
            else:
                mean += tl.where(inside, delta / tl.maximum(count, 1.0), 0.0)
            rest = x - start - mean
            m2 += tl.where(inside, delta * rest, 0.0)
        else:
            m2 += x * x
    total = tl.sum(count, 1, keep_dims=True)
    middle = tl.sum(count * mean, 1, keep_dims=True) / tl.maximum(total, 1.0)
    apart = mean - middle
    m2 = tl.sum(m2 + count * apart * apart, 1, keep_dims=True)
    part = instance * tl.num_programs(1) + split
    at = part * channels + channel
    tl.store(count_ptr + at, total, mask=known)
    tl.store(mean_ptr + at, middle, mask=known)
    tl.store(m2_ptr + at, m2, mask=known)


@triton.jit
def merge_moments(
    count_ptr,
    mean_ptr,
    m2_ptr,
    x_ptr,
    shifted_ptr,
    whole_ptr,
    var_ptr,
    rstd_ptr,
    splits,
    channels,
    groups,
    instance_stride,
    channel_stride,
    eps,
    CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge the parts of one group of one instance (or of all).

    The mean is told twice: less the first value, and as it is.
    """
    group = tl.program_id(0)
    instance = tl.program_id(1).to(tl.int64)
    width = channels // groups
    parts = splits * width
    count = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK,), tl.float32)
    m2 = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        inside = part < parts
        split = instance * splits + part // width
        at = split * channels + group * width + part % width
        size = tl.load(count_ptr + at, mask=inside, other=0.0)
        here = tl.load(mean_ptr + at, mask=inside, other=0.0)
        total = count + size
        share = size / tl.maximum(total, 1.0)
        delta = tl.where(size > 0, here - mean, 0.0)
        m2 += tl.load(m2_ptr + at, mask=inside, other=0.0)
        m2 += delta * delta * count * share
        mean += delta * share
        count = total
    total = tl.sum(count, 0)
    middle = tl.sum(count * mean, 0) / total
    apart = mean - middle
    var = tl.sum(m2 + count * apart * apart, 0) / total
    at = instance * groups + group
    if CENTERED:
        start = instance * instance_stride + group * width * channel_stride
        start = tl.load(x_ptr + start).to(tl.float32)
        tl.store(shifted_ptr + at, middle)
        tl.store(whole_ptr + at, start + middle)
    tl.store(var_ptr + at, var)
    tl.store(rstd_ptr + at, 1.0 / tl.sqrt(var + eps))


@triton.jit
def channel_affine(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    y_ptr,
    channels,
    groups,
    outer,
    inner,
    instance_stride,
    outer_stride,
    inner_stride,
    channel_stride,
    per_split,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """``(x - mean) * rstd * weight + bias``, from the last block back.

    What :func:`channel_moments` has read last is still in the cache.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    lane = tl.arange(0, INNER)[None, :]
    instance = tl.program_id(2).to(tl.int64)
    known = channel < channels
    width = channels // groups
    group = instance * groups + channel // width
    rstd = tl.load(rstd_ptr + group, mask=known, other=0.0)
    weight, bias = _parameters(weight_ptr, bias_ptr, channel, known)
    base = instance * instance_stride
    start, mean = _middle(
        x_ptr + base, mean_ptr, group, channel, known, width, channel_stride
    )
    base = base + channel.to(tl.int64) * channel_stride
    first = tl.program_id(1) * per_split
    last = tl.minimum(first + per_split, outer * tl.cdiv(inner, INNER))
    for back in tl.range(last - first, num_stages=STAGES):
        block = last - 1 - back
        at, inside = _place(
            base, block, lane, known, inner, outer_stride, inner_stride, INNER
        )
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = (x - start - mean) * (rstd * weight) + bias
        y = _activate(y, ACTIVATION)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def channel_sums(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dweight_ptr,
    dbias_ptr,
    channels,
    groups,
    outer,
    inner,
    instance_stride,
    outer_stride,
    inner_stride,
    channel_stride,
    per_split,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Sums of dy * xhat and of dy over a part of each channel."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    lane = tl.arange(0, INNER)[None, :]
    split = tl.program_id(1)
    instance = tl.program_id(2).to(tl.int64)
    known = channel < channels
    width = channels // groups
    group = instance * groups + channel // width
    rstd = tl.load(rstd_ptr + group, mask=known, other=0.0)
    weight, bias = _parameters(weight_ptr, bias_ptr, channel, known)
    base = instance * instance_stride
    start, mean = _middle(
        x_ptr + base, mean_ptr, group, channel, known, width, channel_stride
    )
    base = base + channel.to(tl.int64) * channel_stride
    first = split * per_split
    last = tl.minimum(first + per_split, outer * tl.cdiv(inner, INNER))
    dweight = tl.zeros((CHANNELS, INNER), tl.float32)
    dbias = tl.zeros((CHANNELS, INNER), tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        at, inside = _place(
            base, block, lane, known, inner, outer_stride, inner_stride, INNER
        )
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        xhat = (x - start - mean) * rstd
        dy = _through(dy, xhat * weight + bias, ACTIVATION)
        dweight += dy * xhat
        dbias += dy
    part = instance * tl.num_programs(1) + split
    at = part * channels + channel
    total = tl.sum(dweight, 1, keep_dims=True)
    tl.store(dweight_ptr + at, total, mask=known)
    total = tl.sum(dbias, 1, keep_dims=True)
    tl.store(dbias_ptr + at, total, mask=known)


@triton.jit
def merge_sums(
    dweight_ptr,
    dbias_ptr,
    weight_ptr,
    gxhat_ptr,
    g_ptr,
    splits,
    channels,
    groups,
    BLOCK: tl.constexpr,
):
    """The sums of g * xhat and of g over one group, g = dy * weight."""
    group = tl.program_id(0)
    instance = tl.program_id(1).to(tl.int64)
    width = channels // groups
    parts = splits * width
    gxhat = tl.zeros((BLOCK,), tl.float32)
    g = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        inside = part < parts
        channel = group * width + part % width
        at = (instance * splits + part // width) * channels + channel
        dweight = tl.load(dweight_ptr + at, mask=inside, other=0.0)
        dbias = tl.load(dbias_ptr + at, mask=inside, other=0.0)
        weight, _ = _parameters(weight_ptr, None, channel, inside)
        gxhat += dweight * weight
        g += dbias * weight
    at = instance * groups + group
    tl.store(gxhat_ptr + at, tl.sum(gxhat, 0))
    tl.store(g_ptr + at, tl.sum(g, 0))


@triton.jit
def channel_dx(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    gxhat_ptr,
    g_ptr,
    dx_ptr,
    channels,
    groups,
    outer,
    inner,
    instance_stride,
    outer_stride,
    inner_stride,
    channel_stride,
    per_split,
    size,
    CENTERED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Dx of a part of each channel, from the last block back."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    lane = tl.arange(0, INNER)[None, :]
    instance = tl.program_id(2).to(tl.int64)
    known = channel < channels
    width = channels // groups
    group = instance * groups + channel // width
    rstd = tl.load(rstd_ptr + group, mask=known, other=0.0)
    weight, bias = _parameters(weight_ptr, bias_ptr, channel, known)
    gxhat = tl.load(gxhat_ptr + group, mask=known, other=0.0) / size
    base = instance * instance_stride
    start, mean = _middle(
        x_ptr + base, mean_ptr, group, channel, known, width, channel_stride
    )
    g = 0.0
    if CENTERED:
        g = tl.load(g_ptr + group, mask=known, other=0.0) / size
    base = base + channel.to(tl.int64) * channel_stride
    first = tl.program_id(1) * per_split
    last = tl.minimum(first + per_split, outer * tl.cdiv(inner, INNER))
    for back in tl.range(last - first, num_stages=STAGES):
        block = last - 1 - back
        at, inside = _place(
            base, block, lane, known, inner, outer_stride, inner_stride, INNER
        )
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        xhat = (x - start - mean) * rstd
        dy = _through(dy, xhat * weight + bias, ACTIVATION)
        dx = (dy * weight - xhat * gxhat - g) * rstd
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
