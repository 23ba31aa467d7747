"""Variations on the norms, beyond those of torch.nn.

Four batch norms: :class:`NoisyBatchNorm`, :class:`LpBatchNorm`,
:class:`GhostBatchNorm`, :class:`BatchRenorm`. Each takes the arguments of
:class:`normlib.BatchNorm`, and its own by name; differs from it in training
only; and has its keys, its errors and its evaluation. Statistics of another
image: :class:`AdaIN`. Weights normalized in place of activations:
:func:`weight_norm`, :func:`weight_standardization`. No statistics at all:
:class:`DyT`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn import Module, Parameter
from torch.nn.utils.parametrize import (
    is_parametrized,
    register_parametrization,
)

from normlib import functional
from normlib.axes import View, channel_view, stat_axes
from normlib.backends.eager import affine, restore, settle, widen
from normlib.modules import BatchNorm
from normlib.stats import Moments, center, update_running


def perturb(
    x: Tensor,
    n_mu: float = 0.5,
    n_sigma: float = 1.25,
    r_mu: float = 0.1,
    r_sigma: float = 0.1,
    generator: Generator | None = None,
) -> Tensor:
    """Scale and shift each channel of each instance at random: ``s*x + m``.

    The distribution of this noise is itself drawn at every call, for each
    channel: ``mu`` uniform between ±n_mu and ``sigma`` uniform between 1 and
    n_sigma. Then come, for each instance and channel, ``m`` uniform between
    mu ± r_mu, and ``s`` normal with mean sigma and standard deviation r_sigma.
    All positions of a channel share them.

    Args:
        x: (N, C) or (N, C, ...).
        n_mu: how far the mean shift may lie from 0.
        n_sigma: how large the mean scale may be, at least 1.
        r_mu: how far a shift may lie from its mean.
        r_sigma: the standard deviation of a scale.
        generator: of the noise, on the device of x; None for torch's own.

    Returns:
        The perturbed x, in its shape and dtype.

    Raises:
        ValueError: n_sigma is below 1, or another bound below 0.

    The defaults are those of Santurkar et al. (2018, appendix A). Chapter 3.
    """
    _check_noise(n_mu, n_sigma, r_mu, r_sigma)
    wide = widen(x)
    n, c = x.shape[:2]
    mu, sigma = (wide.new_empty(c) for _ in range(2))
    mu.uniform_(-n_mu, n_mu, generator=generator)
    sigma.uniform_(1, n_sigma, generator=generator)
    m, s = (wide.new_empty(n, c) for _ in range(2))
    m.uniform_(-r_mu, r_mu, generator=generator).add_(mu)
    s.normal_(0, r_sigma, generator=generator).add_(sigma)
    shape = (n, c) + (1,) * (x.dim() - 2)
    return (wide * s.reshape(shape) + m.reshape(shape)).to(x.dtype)


class _Variant(BatchNorm):
    """Batch normalization with arguments of its own, which repr shows."""

    _own: tuple[str, ...] = ()

    def extra_repr(self) -> str:
        """The arguments of BatchNorm, then those of the variant."""
        own = [f"{name}={getattr(self, name)}" for name in self._own]
        return ", ".join([super().extra_repr(), *own])


class NoisyBatchNorm(_Variant):
    """Batch normalization, then noise that makes its output unstable again.

    In training :func:`perturb` follows the norm, so that every channel has
    another mean and variance at each step. In evaluation there is no noise,
    and nothing makes up for its mean scale of ``(1 + n_sigma) / 2``.

    Args:
        n_mu: see :func:`perturb`, as for the others.
        n_sigma: likewise.
        r_mu: likewise.
        r_sigma: likewise.
        generator: likewise.

    Raises:
        ValueError: see :func:`perturb`; in ``forward`` too.

    Santurkar, Tsipras, Ilyas & Madry (2018). Chapter 3.
    """

    _own = ("n_mu", "n_sigma", "r_mu", "r_sigma")

    def __init__(
        self,
        *args,
        n_mu: float = 0.5,
        n_sigma: float = 1.25,
        r_mu: float = 0.1,
        r_sigma: float = 0.1,
        generator: Generator | None = None,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        _check_noise(n_mu, n_sigma, r_mu, r_sigma)
        self.n_mu, self.n_sigma = n_mu, n_sigma
        self.r_mu, self.r_sigma = r_mu, r_sigma
        self.generator = generator

    def forward(self, input: Tensor) -> Tensor:
        """Normalize a batch; in training, perturb what comes out."""
        noise = [getattr(self, name) for name in self._own]
        _check_noise(*noise)
        y = super().forward(input)
        return perturb(y, *noise, self.generator) if self.training else y


class GhostBatchNorm(_Variant):
    """Batch normalization of parts of the batch, each by itself.

    In training the batch is cut, in its order, into the fewest ghost batches
    that are no larger than allowed, of sizes that differ by one at most. They
    pass through :class:`normlib.BatchNorm` in turn: as in the paper, the
    running statistics move once for each, and ``num_batches_tracked`` counts
    them. In evaluation nothing is cut.

    Args:
        virtual_batch_size: the largest size of a ghost batch.

    Raises:
        ValueError: virtual_batch_size is below 1; in ``forward``, a ghost
            batch of one value per channel.

    Hoffer, Hubara & Soudry (2017). Chapter 6.
    """

    _own = ("virtual_batch_size",)

    def __init__(self, *args, virtual_batch_size: int = 128, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if virtual_batch_size < 1:
            raise ValueError(
                "virtual_batch_size must be at least 1, "
                f"but got {virtual_batch_size}"
            )
        self.virtual_batch_size = virtual_batch_size

    def forward(self, input: Tensor) -> Tensor:
        """Normalize a batch; in training, each ghost batch by itself."""
        normalize = super().forward
        if not self.training:
            return normalize(input)
        self._check_input_dim(input)
        count = math.ceil(input.shape[0] / self.virtual_batch_size)
        parts = input.tensor_split(max(count, 1))
        smallest = tuple(parts[-1].shape)
        if channel_view(smallest).count(over_batch=True) == 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, got "
                f"a ghost batch of size {smallest} from input size "
                f"{tuple(input.shape)} and "
                f"virtual_batch_size={self.virtual_batch_size}"
            )
        return torch.cat([normalize(part) for part in parts])


class _ByBatch(_Variant):
    """Batch normalization with another formula where the batch decides."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize a batch; in training, also move the running statistics."""
        by_batch = self.training or self.running_mean is None
        if not by_batch or input.numel() == 0:
            return super().forward(input)
        self._check_input_dim(input)
        parts = (*self._tracked(), self.weight, self.bias)
        functional._check_batch_norm(input, *parts, True, None, self.eps)
        view = channel_view(input.shape)
        y, batch = self._normalize(widen(settle(input)).reshape(view))
        if self._tracked()[0] is not None:
            update_running(*self._tracked(), batch, self._next_momentum())
            self.num_batches_tracked.add_(1)
        return restore(y, input)

    def _tracked(self) -> tuple[Tensor | None, Tensor | None]:
        """The running statistics, where this call is to move them."""
        if self.training and self.track_running_stats:
            return self.running_mean, self.running_var
        return None, None

    def _normalize(self, x: Tensor) -> tuple[Tensor, Moments]:
        """Y of shape (N, C, 1, M), and what the running statistics take."""
        raise NotImplementedError


class LpBatchNorm(_ByBatch):
    """Batch normalization by an Lp norm in place of the standard deviation.

    ``y = (x - mean) / sqrt(scale^2 + eps) * weight + bias`` for each
    channel, where ``scale = ⟨|x - mean|^p⟩^(1/p)`` over the batch and its
    positions: the mean absolute deviation for p = 1, the largest for
    infinity. p = 2 is batch normalization. The others are left without a
    constant that would bring them into line with it: of normal x, the scale
    of p = 1 is ``sqrt(2 / pi)`` = 0.798 standard deviations, and that of
    infinity grows with the count.

    ``running_var`` takes ``scale^2``, times ``n / (n - 1)`` as a variance is,
    and so serves one p only.

    Args:
        p: 1, 2, or infinity (``math.inf``).
        before_shift: whether the scale is that of x itself, the mean still
            in it, as in the paper. Then p = 2 is the root mean square.

    Raises:
        ValueError: another p.

    Santurkar, Tsipras, Ilyas & Madry (2018, section 3.3). Chapter 3.
    """

    _own = ("p", "before_shift")

    def __init__(
        self, *args, p: float = 1, before_shift: bool = False, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        if p not in (1, 2, math.inf):
            raise ValueError(f"p must be 1, 2 or infinity, but got {p}")
        self.p = p
        self.before_shift = before_shift

    def _normalize(self, x):
        centered, batch = center(x, stat_axes(over_batch=True))
        square = self._square(x if self.before_shift else centered)
        weight, bias = _beside(self.weight), _beside(self.bias)
        y = affine(centered, None, square, weight, bias, self.eps)
        return y, batch._replace(var=square)

    def _square(self, x: Tensor) -> Tensor:
        axes = stat_axes(over_batch=True)
        if self.p == 2:
            return Moments.about_zero(x, axes).var
        reduce = torch.mean if self.p == 1 else torch.amax
        return reduce(x.abs(), axes, keepdim=True).square()


class BatchRenorm(_ByBatch):
    """Batch normalization, corrected towards the running statistics.

    In training ``y = (xhat * r + d) * weight + bias``, with xhat of batch
    normalization and, for each channel,

    - ``r = sqrt((var + eps) / (running_var + eps))``, between 1 / r_max and
      r_max,
    - ``d = (mean - running_mean) / sqrt(running_var + eps)``, between ±d_max,

    both constants to the gradient. Without the limits y is that of
    evaluation. With ``r_max = 1`` and ``d_max = 0``, the defaults, it is that
    of batch normalization. Training starts there; then raise the attributes
    ``r_max`` and ``d_max``, which are no part of the state, step by step (the
    paper: from step 5,000 on, to 3 at 40,000 and to 5 at 25,000, with a
    momentum of 0.01).

    The running statistics are those of BatchNorm, where the paper averages
    standard deviations; they move after they have been used. Where they are
    not tracked, this is batch normalization.

    Args:
        r_max: the limit of r, at least 1; infinity for none.
        d_max: the limit of d, at least 0; infinity for none.

    Raises:
        ValueError: a limit below its least value, in ``forward`` too.

    Ioffe (2017). Chapter 4.
    """

    _own = ("r_max", "d_max")

    def __init__(
        self, *args, r_max: float = 1.0, d_max: float = 0.0, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        self.r_max = r_max
        self.d_max = d_max
        self._check_limits()

    def forward(self, input: Tensor) -> Tensor:
        """Normalize a batch; in training, corrected by r and d."""
        self._check_limits()
        return super().forward(input)

    def _normalize(self, x):
        x, batch = center(x, stat_axes(over_batch=True))
        weight, bias = _beside(self.weight), _beside(self.bias)
        if self._tracked()[0] is not None:
            r, d = self._correction(batch)
            shift = d if weight is None else d * weight
            weight = r if weight is None else r * weight
            bias = shift if bias is None else shift + bias
        return affine(x, None, batch.var, weight, bias, self.eps), batch

    @torch.no_grad()
    def _correction(self, batch: Moments) -> tuple[Tensor, Tensor]:
        mean, var = map(_beside, self._tracked())
        r = ((batch.var + self.eps) / (var + self.eps)).sqrt()
        d = affine(batch.mean, mean, var, None, None, self.eps)
        r = r.clamp(1 / self.r_max, self.r_max)
        d = d.clamp(-self.d_max, self.d_max)
        # Put together because torch.compile would compute r and d again in
        # the backward, from running statistics that have moved by then; a
        # stack it keeps (pytorch/pytorch#197039).
        return torch.stack((r, d)).unbind()

    def _check_limits(self) -> None:
        if not (self.r_max >= 1 and self.d_max >= 0):
            raise ValueError(
                "r_max must be at least 1 and d_max at least 0, "
                f"but got r_max={self.r_max} and d_max={self.d_max}"
            )


def adaptive_instance_norm(
    content: Tensor, style: Tensor, eps: float = 1e-5
) -> Tensor:
    """Give each channel of the content the style's mean and deviation.

    ``y = (x - mean) / sqrt(var + eps) * sqrt(var_s + eps) + mean_s`` for each
    instance and channel, with biased variances over the positions. By its
    own statistics an image does not change.

    Args:
        content: (N, C, ...) with more than one position, floating point.
        style: (N, C, ...), or (1, C, ...) for all instances; any positions.
        eps: added to both variances.

    Returns:
        y in the shape, dtype and memory format of the content.

    Raises:
        NotImplementedError: an input is not floating point.
        ValueError: shapes or dtypes that do not match, one position of
            content or none of style, a negative eps.

    Huang & Belongie (2017). Chapter 5.
    """
    _check_style(content, style)
    y, _, _ = functional.normalize(
        widen(content), channel_view(content.shape), eps=eps
    )
    view = channel_view(style.shape)
    found = Moments.of(widen(style).reshape(view), stat_axes(False))
    shape = (view.N, view.G) + (1,) * (content.dim() - 2)
    deviation = (found.var + eps).sqrt().reshape(shape)
    return (y * deviation + found.mean.reshape(shape)).to(content.dtype)


class AdaIN(Module):
    """:func:`adaptive_instance_norm` as a layer of two inputs.

    Args:
        eps: added to the variances.

    Huang & Belongie (2017). Chapter 5.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        """See :func:`adaptive_instance_norm`."""
        return adaptive_instance_norm(content, style, self.eps)

    def extra_repr(self) -> str:
        """The constructor's argument."""
        return f"eps={self.eps}"


def weight_norm(
    module: Module, name: str = "weight", dim: int | None = 0
) -> Module:
    """Learn a weight as length and direction: ``w = g * v / ||v||``.

    As :func:`torch.nn.utils.parametrizations.weight_norm`, with the same
    parameters and keys: checkpoints go from one to the other.

    Args:
        module: changed in place. ``parametrizations.weight.original0`` is g
            and ``original1`` is v; at first they make up the old weight.
        name: of the weight.
        dim: the axis along which the lengths are kept apart (0: one for each
            output); None (or -1, as in torch) for one length of the whole.

    Returns:
        The module.

    Raises:
        ValueError: there is no such weight, or it is parametrized already.
        IndexError: the weight has no such axis.

    Salimans & Kingma (2016). Chapter 5.
    """
    if is_parametrized(module, name):
        raise ValueError(
            f"{name} of {type(module).__name__} is parametrized already: "
            "weight_norm must be the first"
        )
    register_parametrization(module, name, WeightNorm(dim))

    def rename(module, state_dict, prefix, *rest):
        # Checkpoints of torch.nn.utils.weight_norm, torch's older one.
        for old, new in (("g", "original0"), ("v", "original1")):
            if (key := f"{prefix}{name}_{old}") in state_dict:
                key_now = f"{prefix}parametrizations.{name}.{new}"
                state_dict[key_now] = state_dict.pop(key)

    module.register_load_state_dict_pre_hook(rename)
    return module


class WeightNorm(Module):
    """The parametrization of :func:`weight_norm`.

    ``v / ||v||`` is the RMS norm of the rows of v, over ``sqrt(fan_in)``.

    Args:
        dim: the axis along which the lengths are kept apart, or None.

    Salimans & Kingma (2016). Chapter 5.
    """

    def __init__(self, dim: int | None = 0) -> None:
        super().__init__()
        self.dim = -1 if dim is None else dim

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """The weight, of the shape of v, from its length and direction.

        Args:
            g: the lengths: the shape of v with 1 on all axes but ``dim``, or
                no axes where that is None.
            v: the directions, of any length.
        """
        rows, view = _rows(v, None if self.dim == -1 else self.dim)
        gain = widen(g) / math.sqrt(view.M)
        w, _, _ = functional.normalize(
            rows, view, gain, eps=0.0, centered=False
        )
        return w if self.dim == -1 else w.movedim(0, self.dim)

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """``g = ||w||`` and ``v = w``."""
        return torch.norm_except_dim(w, 2, self.dim), w


def weight_standardization(
    module: Module, name: str = "weight", dim: int = 0, eps: float = 1e-5
) -> Module:
    """Take mean and deviation out of the weights of each output.

    ``(w - mean) / sqrt(var + eps)``, with the biased variance, over all
    weights that lead to one output channel. There is no gain: a norm is meant
    to follow the layer.

    Args:
        module: changed in place; ``parametrizations.weight.original`` is w.
        name: of the weight.
        dim: the axis of the outputs: 0 in a linear layer and a convolution,
            1 in a transposed convolution.
        eps: added to the variance, in its units: 1e-5 is a tenth of the
            variance of weights of size 0.01.

    Returns:
        The module.

    Raises:
        ValueError: there is no such weight; an output has only one, and so
            no deviation; a negative eps.
        IndexError: the weight has no such axis.

    Qiao, Wang, Liu, Shen & Yuille (2019). Chapter 7.
    """
    register_parametrization(module, name, WeightStandardization(dim, eps))
    return module


class WeightStandardization(Module):
    """The parametrization of :func:`weight_standardization`.

    It is the layer norm of the rows of w.

    Args:
        dim: the axis of the outputs.
        eps: added to the variances.

    Raises:
        ValueError: in ``forward``, an output has only one weight; a negative
            eps.

    Qiao, Wang, Liu, Shen & Yuille (2019). Chapter 7.
    """

    def __init__(self, dim: int = 0, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, w: Tensor) -> Tensor:
        """The standardized weight."""
        rows, view = _rows(w, self.dim)
        if view.M == 1:
            raise ValueError(
                "expected more than 1 weight for each output, "
                f"got shape {tuple(w.shape)} with dim={self.dim}"
            )
        y, _, _ = functional.normalize(rows, view, eps=self.eps)
        return y.movedim(0, self.dim)

    def right_inverse(self, w: Tensor) -> Tensor:
        """W itself: what is assigned to the weight will be standardized."""
        return w

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"dim={self.dim}, eps={self.eps}"


class DyT(Module):
    """Dynamic tanh: ``weight * tanh(alpha * x) + bias``, no statistics.

    Args:
        normalized_shape: the last axes of the input, as in LayerNorm: each
            place there has its own weight and bias.
        init_alpha: the start of alpha, one learned number.
        device: of the parameters.
        dtype: likewise, floating point.

    Parameters, with the keys of the authors' code: ``alpha`` (1,), ``weight``
    (starts at 1) and ``bias`` (at 0), both of ``normalized_shape``.

    Raises:
        NotImplementedError: in ``forward``, an input not of floating point.
        RuntimeError: in ``forward``, a shape that does not end in
            ``normalized_shape``, or a dtype that is not the parameters'.

    Zhu, Chen, He, LeCun & Liu (2025). Chapter 7.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        init_alpha: float = 0.5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if isinstance(normalized_shape, int):
            normalized_shape = (normalized_shape,)
        self.normalized_shape = tuple(normalized_shape)
        self.init_alpha = init_alpha

        def empty(*shape):
            return Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.alpha = empty(1)
        self.weight = empty(*self.normalized_shape)
        self.bias = empty(*self.normalized_shape)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Alpha as given, weight 1, bias 0."""
        torch.nn.init.constant_(self.alpha, self.init_alpha)
        torch.nn.init.ones_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Squash each value of (..., D), which ends in normalized_shape."""
        alpha, weight, bias = self.alpha, self.weight, self.bias
        functional._check_trailing("DyT", input, self.normalized_shape)
        functional._check_dtypes(input, alpha=alpha, weight=weight, bias=bias)
        y = weight * torch.tanh(alpha * widen(input)) + bias
        return y.to(input.dtype)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"{self.normalized_shape}, init_alpha={self.init_alpha}"


def _beside(p: Tensor | None) -> Tensor | None:
    """One value for each channel, beside (N, C, 1, M)."""
    return None if p is None else widen(p).reshape(1, -1, 1, 1)


def _rows(w: Tensor, dim: int | None) -> tuple[Tensor, View]:
    """A weight with the axis dim in front, and each of its rows a group."""
    if dim is None:
        return w, View(1, 1, 1, w.numel())
    rows = w.movedim(dim, 0)
    return rows, View(1, rows.shape[0], 1, math.prod(rows.shape[1:]))


def _check_noise(n_mu, n_sigma, r_mu, r_sigma) -> None:
    if not (n_sigma >= 1 and min(n_mu, r_mu, r_sigma) >= 0):
        raise ValueError(
            "n_sigma must be at least 1 and n_mu, r_mu, r_sigma at least 0, "
            f"but got n_mu={n_mu}, n_sigma={n_sigma}, r_mu={r_mu}, "
            f"r_sigma={r_sigma}"
        )


def _check_style(content: Tensor, style: Tensor) -> None:
    shapes = tuple(content.shape), tuple(style.shape)
    n, c = (*shapes[0], None, None)[:2]
    if c is None or shapes[1][:2] not in ((n, c), (1, c)):
        rule = "shapes (N, C, ...) and (N, C, ...) or (1, C, ...)"
    elif content.dtype != style.dtype:
        rule = "one dtype"
    elif math.prod(shapes[0][2:]) == 1 or math.prod(shapes[1][2:]) == 0:
        rule = "more than 1 position of content, and at least 1 of style"
    else:
        return
    raise ValueError(
        f"expected {rule}; got content of shape {shapes[0]}, {content.dtype}, "
        f"and style of shape {shapes[1]}, {style.dtype}"
    )
