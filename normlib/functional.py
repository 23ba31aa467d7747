"""The norms as functions on PyTorch tensors.

:func:`normalize` is the one formula. The five norms are the same with the
signatures of ``torch.nn.functional``; each sees its input as
(N, G, K, M) and leaves the choice of a backend to :mod:`normlib.backends`.
Where none of ours is faster, torch's own kernel is called. A neighbor can be
taken along: by the keyword ``activation`` a ReLU or SiLU behind any of the
five, by :func:`add_layer_norm` and :func:`add_rms_norm` the residual addition
before. :func:`moments` and :func:`batch_normalization` are TensorFlow's pair
from ``tf.nn``.
"""

import numbers
from collections.abc import Iterable, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from normlib import backends
from normlib.axes import View, channel_view, trailing_view
from normlib.backends import fused
from normlib.backends.eager import (
    ACTIVATIONS,
    HALF,
    activate,
    affine,
    restore,
    widen,
)
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
    _check_eps("normalize", eps)
    _check_view(x, view)
    _check_sizes(x, view.G * view.K, weight=weight, bias=bias)
    _check_dtypes(x, weight=weight, bias=bias)
    call = (x, view, weight, bias, eps)
    kind = {"over_batch": over_batch, "centered": centered}
    done = None
    if backends.considers(x, "normalize", weight):
        done = _normalize(*call, moments=True, **kind)
    y, found = done or backends.eager.normalize(*call, **kind)
    shape = (view.G,) if over_batch else (view.N, view.G)
    return y, found.mean.reshape(shape), found.var.reshape(shape)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
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
        activation: of y: None, ``"relu"`` or ``"silu"``. In the same kernel
            where a backend has one that pays, and then rounded once.

    Returns:
        y in the shape and dtype of the input.

    Raises:
        IndexError: the input has fewer than two axes.
        NotImplementedError: the input is not floating point.
        ValueError: one value per channel in training; eps that is not
            positive in training, or negative; one running statistic; an
            unknown activation.
        RuntimeError: sizes or dtypes that do not match; evaluation without
            running statistics.

    A call that refuses its input leaves the running statistics as they were.
    Ioffe & Szegedy (2015). Chapter 2.
    """
    _check_activation(activation)
    norm = "batch_norm" if training else "evaluation"
    considered = backends.considers(
        input, norm, weight, bias, running_mean, running_var
    )
    # Torch's kernel takes a number; under a compiler it may be a tensor.
    formula = training and isinstance(momentum, Tensor)
    args = (running_mean, running_var, weight, bias, training, momentum, eps)
    if (considered or formula) and _fits(_check_batch_norm, input, *args):
        if considered and training and not formula and _free(input):
            running = None if running_mean is None else args[:2]
            y = backends.cpu.watched_batch_norm(
                input, running, weight, bias, momentum, eps
            )
            if y is not None:
                return activate(y, activation)
        call = (input, channel_view(input.shape), weight, bias, eps)
        kind = {"over_batch": True, "centered": True}
        given = None if training else (running_mean, running_var)
        found = None
        if considered:
            wanted = running_mean is not None
            found = _normalize(
                *(*call, activation),
                moments=wanted,
                given=given,
                **kind,
            )
        if found is None and formula:
            y, batch = backends.eager.normalize(*call, **kind)
            found = activate(y, activation), batch
        if found is not None:
            y, batch = found
            if training and running_mean is not None:
                running = running_mean, running_var
                if fused.plain(*running):
                    # As torch's kernel, without counting it as a change: a
                    # graph of torch's own holds them, and does not use them.
                    running = [r.data for r in running]
                update_running(*running, batch, momentum)
            return y
    if (
        not training
        and torch.is_grad_enabled()
        and (
            input.requires_grad
            or (weight is not None and weight.requires_grad)
        )
    ):
        # Torch's backward reads them again; by then they may have moved.
        running_mean, running_var = _copied(running_mean, running_var)
    y = _torchs(
        F.batch_norm,
        _check_batch_norm,
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
    )
    return activate(y, activation)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
) -> Tensor:
    """Normalize each channel of each instance over its positions.

    Where running statistics are given and the input's are used, they move
    towards the instances' averages in place: of the means, and of the
    unbiased variances.

    Args:
        input: (N, C, ...) with more than one position, floating point.
        running_mean: (C,), or None.
        running_var: (C,), or None; both or neither.
        weight: scale, (C,), or None. float32 for a 16-bit input, or else of
            the input's dtype, like the other three.
        bias: shift, (C,), or None.
        use_input_stats: where False, normalize by the running statistics.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        activation: of y; see :func:`batch_norm`.

    Returns:
        y in the shape and dtype of the input. float32 and float64 with the
        channels last stay so on a CPU; otherwise y is contiguous, as torch's.

    Raises:
        NotImplementedError: the input is not floating point.
        ValueError: one value per statistic; negative eps; one running
            statistic; an unknown activation.
        RuntimeError: sizes or dtypes that do not match; no running
            statistics where they are to be used.

    Ulyanov, Vedaldi & Lempitsky (2016). Chapter 5.
    """
    _check_activation(activation)
    _check_eps("instance_norm", eps)
    norm = "instance_norm" if use_input_stats else "evaluation"
    args = (
        *(running_mean, running_var, weight, bias),
        *(use_input_stats, momentum, eps),
    )
    if backends.considers(input, norm, weight) and _fits(
        _check_instance_norm, input, *args
    ):
        found = _normalize(
            input,
            channel_view(input.shape),
            weight,
            bias,
            eps,
            activation,
            given=None if use_input_stats else (running_mean, running_var),
            moments=running_mean is not None,
        )
        if found is not None:
            y, each = found
            moved = running_mean is not None and input.numel() > 0
            if use_input_stats and moved:
                batch = Moments(
                    each.count, each.mean.mean(0), each.var.mean(0)
                )
                update_running(running_mean, running_var, batch, momentum)
            return y
    last = _channels_last(input)
    seen = input.flatten(2) if _misread(input) else input
    y = _torchs(F.instance_norm, _check_instance_norm, seen, *args)
    y = activate(y if seen is input else restore(y, input), activation)
    return y if last is None else y.contiguous(memory_format=last)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
) -> Tensor:
    """Normalize each group of channels of each instance.

    Args:
        input: (N, C) or (N, C, ...), floating point.
        num_groups: G, a divisor of C; neighbouring channels form a group.
        weight: scale, (C,), or None. float32 for a 16-bit input, or else of
            the input's dtype, like the bias.
        bias: shift, (C,), or None.
        eps: added to the variance.
        activation: of y; see :func:`batch_norm`.

    Returns:
        y in the shape and dtype of the input.

    Raises:
        NotImplementedError: the input is not floating point.
        ValueError: one value in all; negative eps; an unknown activation.
        RuntimeError: fewer than two axes, G does not divide C, sizes or
            dtypes that do not match.

    Wu & He (2018). Chapter 5.
    """
    _check_activation(activation)
    _check_eps("group_norm", eps)
    args = (num_groups, weight, bias, eps)
    if backends.considers(input, "group_norm", weight, bias) and _fits(
        _check_group_norm, input, *args
    ):
        if _free(input):
            y = backends.cpu.watched_group_norm(input, *args)
            if y is not None:
                return activate(y, activation)
        view = channel_view(input.shape, num_groups)
        found = _normalize(input, view, weight, bias, eps, activation)
        if found is not None:
            return found[0]
    # Torch's kernel for channels last takes E[x^2] - E[x]^2 in float32: at a
    # mean of 100 standard deviations its output is off in the second digit,
    # at 10,000 it is noise. (16 bits have no digits to lose.)
    last = _channels_last(input)
    y = _torchs(
        F.group_norm,
        _check_group_norm,
        input if last is None else input.contiguous(),
        *args,
        view=channel_view,
    )
    y = y if last is None else y.contiguous(memory_format=last)
    return activate(y, activation)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
) -> Tensor:
    """Normalize each vector (or block) of the trailing axes by itself.

    Args:
        input: (..., D), where D may be several axes; floating point.
        normalized_shape: the sizes of these axes.
        weight: scale, of shape ``normalized_shape``, or None. float32 for a
            16-bit input, or else of the input's dtype, like the bias.
        bias: shift, likewise.
        eps: added to the variance.
        activation: of y; see :func:`batch_norm`.

    Returns:
        y in the shape and dtype of the input.

    Raises:
        NotImplementedError: the input is not floating point.
        ValueError: negative eps; an unknown activation.
        RuntimeError: shapes or dtypes that do not match.

    Ba, Kiros & Hinton (2016). Chapter 5.
    """
    _check_activation(activation)
    _check_eps("layer_norm", eps)
    args = (normalized_shape, weight, bias, eps)
    if backends.considers(input, "layer_norm", weight) and _fits(
        _check_layer_norm, input, *args
    ):
        view = trailing_view(input.shape, normalized_shape)
        found = _normalize(input, view, weight, bias, eps, activation)
        if found is not None:
            return found[0]
    if weight is None and bias is None and _free(input):
        unit = backends.cpu.unit_weight(input, normalized_shape)
        args = (normalized_shape, unit, None, eps)
    y = _torchs(
        *(F.layer_norm, _check_layer_norm, input, *args), view=trailing_view
    )
    return activate(y, activation)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """Divide each vector (or block) of the trailing axes by its size.

    ``y = x / sqrt(mean(x^2) + eps) * weight``: layer norm without the mean
    and without a shift.

    Args:
        input: (..., D), where D may be several axes; floating point.
        normalized_shape: the sizes of these axes.
        weight: scale, of shape ``normalized_shape``, or None.
        eps: added to the mean square; by default the spacing of the
            numbers at 1 in the dtype of the arithmetic, which is float32
            for a 16-bit input.
        activation: of y; see :func:`batch_norm`.

    Returns:
        y in the shape and dtype of the input.

    Raises:
        NotImplementedError: the input is not floating point.
        ValueError: negative eps; an unknown activation.
        RuntimeError: shapes that do not match.

    Zhang & Sennrich (2019). Chapter 5.
    """
    _check_activation(activation)
    if eps is not None:
        _check_eps("rms_norm", eps)
    args = (normalized_shape, weight, eps)
    if backends.considers(input, "rms_norm", weight) and _fits(
        _check_rms_norm, input, *args
    ):
        view = trailing_view(input.shape, normalized_shape)
        least = _least_eps(input) if eps is None else eps
        call = (input, view, weight, None, least, activation)
        found = _normalize(*call, centered=False)
        if found is not None:
            return found[0]
    y = _torchs(F.rms_norm, _check_rms_norm, input, *args)
    return activate(y, activation)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Add a residual, and take :func:`layer_norm` of the sum.

    ``total = input + residual; y = layer_norm(total)``, as between the
    blocks of a Transformer, where both are needed. One kernel does it in 4
    passes over memory in place of 5, its backward in 4 in place of 6, where
    a backend has one that pays; elsewhere it is just these two calls. The
    norm is that of the sum as it is returned, rounded to its dtype.

    Args:
        input: (..., D), where D may be several axes; floating point.
        residual: of the same shape.
        normalized_shape: the sizes of these axes.
        weight: as for :func:`layer_norm` of the sum, as are the next two.
        bias: see there.
        eps: see there.

    Returns:
        y and the sum, in the shape of the input and the dtype of
        ``input + residual``.

    Raises:
        NotImplementedError: the residual or the sum is not floating point.
        TypeError: the residual is no tensor.
        RuntimeError: the residual has another shape or device; and what
            :func:`layer_norm` raises.

    Chapter 10.
    """
    _check_eps("layer_norm", eps)
    _check_residual("add_layer_norm", input, residual)
    args = (normalized_shape, weight, bias, eps)
    call = (layer_norm, _check_layer_norm, input, residual, args)
    return _add(*call, bias=bias, centered=True)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a residual, and take :func:`rms_norm` of the sum.

    ``total = input + residual; y = rms_norm(total)``, otherwise as
    :func:`add_layer_norm`.

    Args:
        input: (..., D), where D may be several axes; floating point.
        residual: of the same shape.
        normalized_shape: the sizes of these axes.
        weight: as for :func:`rms_norm` of the sum.
        eps: likewise.

    Returns:
        y and the sum, in the shape of the input and the dtype of
        ``input + residual``.

    Raises:
        NotImplementedError: the residual or the sum is not floating point.
        TypeError: the residual is no tensor.
        RuntimeError: the residual has another shape or device; and what
            :func:`rms_norm` raises.

    Chapter 10.
    """
    if eps is not None:
        _check_eps("rms_norm", eps)
    _check_residual("add_rms_norm", input, residual)
    args = (normalized_shape, weight, eps)
    call = (rms_norm, _check_rms_norm, input, residual, args)
    return _add(*call, bias=None, centered=False)


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


def fusible(x: Tensor) -> bool:
    """Whether a backend may do a norm of x together with its neighbors.

    A cheap question, which also says yes to some calls that are composed in
    the end.
    """
    return backends.considers(x, "normalize", None, needed="fuse")


_DTYPES = (torch.float64, torch.float32, *HALF)


def _normalize(
    x,
    view,
    weight,
    bias,
    eps,
    activation=None,
    *,
    over_batch=False,
    centered=True,
    given=None,
    moments=False,
):
    """Let a backend do it: y and the moments, None where torch's is best.

    ``given`` are a mean and a variance to normalize by, in place of the
    input's.
    """
    call = (x, view, weight, bias)
    kind = {"over_batch": over_batch, "centered": centered}
    if activation is not None and given is None:
        extras = fused.Extras(activation)
        backend = backends.pick(*call, extras=extras, **kind)
        if backend is not None:
            fuse = backend.fuse
            y, _, found = fuse(*call, eps, extras, moments=moments, **kind)
            return y, found
    backend = backends.pick(*call, given=given, **kind)
    if backend is None:
        return None
    if given is not None:
        y, found = backend.evaluate(x, view, *given, weight, bias, eps), None
    else:
        y, found = backend.normalize(*call, eps, moments=moments, **kind)
    return activate(y, activation), found


def _add(norm, check, x, residual, args, *, bias, centered):
    """Add and normalize: y and the sum, in one kernel where that pays."""
    sizes, weight, *_, eps = args
    asked = backends.considers(x, norm.__name__, weight, needed="fuse")
    if asked and _fits(check, x, *args):
        call = (x, trailing_view(x.shape, sizes), weight, bias)
        kind = {"over_batch": False, "centered": centered}
        extras = fused.Extras(residual=residual)
        backend = backends.pick(*call, extras=extras, **kind)
        if backend is not None:
            eps = _least_eps(x) if eps is None else eps
            return backend.fuse(*call, eps, extras, **kind)[:2]
    total = x + residual
    return norm(total, *args), total


def _free(x: Tensor) -> bool:
    """Whether torch's kernels for the CPU may be chosen from."""
    return backends._forced is None and isinstance(x, Tensor) and x.is_cpu


def _fits(check, *args) -> bool:
    """Whether a backend can take these arguments.

    Where it is ours to choose, bad ones go to torch, which refuses them by
    its own error. A forced backend is asked for ours.
    """
    try:
        check(*args)
    except Exception:
        if backends._forced is not None:
            raise
        return False
    return True


def _torchs(function, check, *args, view=None):
    """Call torch's kernel; where it refuses, say why in our own words.

    But only by an error of the same type: what breaks two rules at once is
    refused by torch's choice of them. With a ``view``, what torch has no
    kernel for is done by the formula.
    """
    try:
        return function(*args)
    except TypeError:  # torch says best what it takes
        raise
    except Exception as error:
        try:
            check(*args)
        except type(error):
            raise
        except Exception:  # another rule is broken too, or not torch's
            pass
        else:
            if view is not None and _mixed(error, *args):
                return _by_formula(view, *args)
        raise


def _mixed(error, x, sizes, weight, bias, eps) -> bool:
    """Whether torch may have refused float32 parameters of a 16-bit input.

    On CUDA its layer and group norm do; on the CPU they take them.
    """
    wide = any(
        p is not None and p.dtype == torch.float32 for p in (weight, bias)
    )
    return type(error) is RuntimeError and x.dtype in HALF and wide


def _by_formula(view, x, sizes, weight, bias, eps):
    kind = {"over_batch": False, "centered": True}
    call = (x, view(x.shape, sizes), weight, bias, eps)
    return backends.eager.normalize(*call, **kind)[0]


def _misread(x: Tensor) -> bool:
    """Whether torch's own instance norm has a wrong backward.

    On the CPU, for a single image or channel, it takes a gradient with the
    channels last (which a layer over the image's tokens sends) for one with
    the channels first. With the positions flattened it does not.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return isinstance(x, Tensor) and x.dim() > 3 and 1 in x.shape[:2]


def _channels_last(x: Tensor) -> torch.memory_format | None:
    """The memory format of an ordinary CPU tensor with its channels last.

    None for another, and for 16 bits.
    """
    if (
        torch.compiler.is_compiling()
        or not isinstance(x, Tensor)
        or not x.is_cpu
        or x.dtype in HALF
        or x.is_contiguous()
        or not fused.plain(x)
    ):
        return None
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(x.dim())
    if last is None or not x.is_contiguous(memory_format=last):
        return None
    return last


def _least_eps(x: Tensor) -> float:
    """The eps of RMS norm where none is given."""
    width = torch.float32 if x.dtype in HALF else x.dtype
    return torch.finfo(width).eps


def _copied(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.clone() for t in tensors]


def _check_batch_norm(
    x, running_mean, running_var, weight, bias, training, momentum, eps
):
    shape = tuple(x.shape)
    if len(shape) < 2:
        raise IndexError(
            f"batch_norm takes (N, C, ...), at least 2 axes; got shape {shape}"
        )
    _check_floating("batch_norm", x)
    running = {"running_mean": running_mean, "running_var": running_var}
    _check_running(running, moved=training)
    if training and channel_view(shape).count(over_batch=True) == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, "
            f"got input size {shape}"
        )
    if training and eps <= 0.0:
        raise ValueError(
            f"batch_norm eps must be positive during training, but got {eps}"
        )
    _check_eps("batch_norm", eps)
    _check_sizes(x, shape[1], **running, weight=weight, bias=bias)
    _check_dtypes(x, **running, weight=weight, bias=bias)


def _check_instance_norm(
    x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
):
    shape = tuple(x.shape)
    if use_input_stats and (len(shape) < 3 or prod(shape[2:]) == 1):
        raise ValueError(
            "Expected more than 1 spatial element when training: "
            "instance_norm takes (N, C, ...) with more than one position, "
            f"got input size {shape}"
        )
    _check_floating("instance_norm", x)
    running = {"running_mean": running_mean, "running_var": running_var}
    _check_running(running, moved=use_input_stats)
    _check_sizes(x, shape[1], **running, weight=weight, bias=bias)
    _check_dtypes(x, **running, weight=weight, bias=bias)


def _check_group_norm(x, num_groups, weight, bias, eps):
    shape = tuple(x.shape)
    if len(shape) < 2:
        raise RuntimeError(
            f"group_norm takes (N, C, ...), at least 2 axes; got shape {shape}"
        )
    if num_groups <= 0 or shape[1] % num_groups:
        raise RuntimeError(
            f"num_channels={shape[1]} is not divisible by "
            f"num_groups={num_groups} (input of shape {shape})"
        )
    if shape[0] * shape[1] // num_groups * prod(shape[2:]) == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, "
            f"got input size {shape} with num_groups={num_groups}"
        )
    _check_floating("group_norm", x)
    _check_shapes(x, (shape[1],), weight=weight, bias=bias)
    _check_dtypes(x, weight=weight, bias=bias)


def _check_layer_norm(x, normalized_shape, weight, bias, eps):
    _check_trailing("layer_norm", x, normalized_shape)
    _check_shapes(x, tuple(normalized_shape), weight=weight, bias=bias)
    _check_dtypes(x, weight=weight, bias=bias)


def _check_rms_norm(x, normalized_shape, weight, eps):
    _check_trailing("rms_norm", x, normalized_shape)
    _check_shapes(x, tuple(normalized_shape), weight=weight)


def _check_residual(function: str, x: Tensor, residual: Tensor) -> None:
    if residual is None or isinstance(residual, numbers.Number):
        raise TypeError(
            f"{function}: the residual must be a tensor, got {residual!r}"
        )
    given = isinstance(x, Tensor) and isinstance(residual, Tensor)
    if torch.jit.is_tracing() or not given:
        return  # a proxy has no shape yet
    if x.shape != residual.shape or x.device != residual.device:
        raise RuntimeError(
            f"{function}: the residual should have shape {tuple(x.shape)} on "
            f"{x.device}, as the input; got shape {tuple(residual.shape)} on "
            f"{residual.device}"
        )
    _check_floating(function, residual)


def _check_trailing(function: str, x: Tensor, normalized_shape) -> None:
    try:
        trailing_view(x.shape, normalized_shape)
    except ValueError as error:
        raise RuntimeError(
            f"Given normalized_shape={tuple(normalized_shape)}, "
            f"{function} {error}"
        ) from None
    _check_floating(function, x)


def _check_activation(activation: str | None) -> None:
    if activation is not None and activation not in tuple(ACTIVATIONS):
        raise ValueError(
            "activation must be None or one of "
            f"{', '.join(map(repr, ACTIVATIONS))}, but got {activation!r}"
        )


def _check_eps(function: str, eps: float) -> None:
    if eps < 0.0:
        raise ValueError(f"{function} eps must be non-negative, but got {eps}")


def _check_running(running: dict[str, Tensor | None], *, moved: bool) -> None:
    missing = [name for name, r in running.items() if r is None]
    if not moved and missing:
        raise RuntimeError(
            f"{missing[0]} must be defined in evaluation mode; it is None"
        )
    if len(missing) == 1:
        raise ValueError(
            "running_mean and running_var must either both be None or "
            f"neither be None; {missing[0]} is None"
        )
    for name, r in running.items():
        if moved and r is not None and r.requires_grad:
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


def _check_shapes(x: Tensor, shape: tuple[int, ...], **parameters) -> None:
    for name, p in parameters.items():
        if p is not None and p.shape != shape:
            raise RuntimeError(
                f"{name} should have shape {shape}, got {tuple(p.shape)} "
                f"(input of shape {tuple(x.shape)})"
            )


def _check_sizes(x: Tensor, size: int, **parameters) -> None:
    for name, p in parameters.items():
        if p is not None and p.numel() != size:
            raise RuntimeError(
                f"{name} should contain {size} elements not {p.numel()} "
                f"(input of shape {tuple(x.shape)})"
            )


def _check_dtypes(x: Tensor, **parameters) -> None:
    given = {k: p.dtype for k, p in parameters.items() if p is not None}
    dtypes = set(given.values())
    allowed = {x.dtype, torch.float32} if x.dtype in HALF else {x.dtype}
    if len(dtypes) > 1 or not dtypes <= allowed:
        raise RuntimeError(
            f"mixed dtype: parameters of an input of {x.dtype} must all be "
            f"of one dtype out of {sorted(map(str, allowed))}; got "
            + ", ".join(f"{name} {dtype}" for name, dtype in given.items())
        )
