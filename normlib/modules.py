"""The norms as layers: torch.nn's constructors, keys, repr and errors.

The classes are :class:`torch.nn.Module` subclasses of our own. That each is a
drop-in for its namesake in torch.nn is tested, not inherited.
"""

import numbers
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn import Module, Parameter, Sequential

from normlib import functional


def _shows_bias(name: str, *sizes: int) -> bool:
    """Whether the installed torch.nn tells a layer's bias in its repr."""
    return "bias=" in repr(getattr(torch.nn, name)(*sizes))


_BATCH_NORM_SHOWS_BIAS = _shows_bias("BatchNorm1d", 1)
_GROUP_NORM_SHOWS_BIAS = _shows_bias("GroupNorm", 1, 1)
_LAYER_NORM_SHOWS_BIAS = _shows_bias("LayerNorm", 1)


class _ChannelNorm(Module):
    """What batch and instance norm share: parameters, buffers, their keys.

    The defaults are those of batch norm.
    """

    _version = 2
    _ranks: tuple[int, ...] = ()
    _takes = ""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats

        def empty():
            return torch.empty(num_features, device=device, dtype=dtype)

        self.register_parameter(
            "weight", Parameter(empty()) if affine else None
        )
        self.register_parameter(
            "bias", Parameter(empty()) if affine and bias else None
        )
        track = track_running_stats
        count = torch.empty((), device=device, dtype=torch.long)
        self.register_buffer("running_mean", empty() if track else None)
        self.register_buffer("running_var", empty() if track else None)
        self.register_buffer("num_batches_tracked", count if track else None)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, no batch seen."""
        if self.track_running_stats:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, and the running statistics as at first."""
        self.reset_running_stats()
        _reset(self.weight, self.bias)

    def extra_repr(self) -> str:
        """The constructor's arguments, in the words of torch.nn's repr."""
        bias = self.bias is not None
        shown = f"bias={bias}, " if _BATCH_NORM_SHOWS_BIAS else ""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, {shown}"
            f"track_running_stats={self.track_running_stats}"
        )

    def _check_input_dim(self, input: Tensor) -> None:
        rank = input.dim()
        if rank in self._ranks or (rank >= 2 and not self._ranks):
            return
        expected = " or ".join(f"{r}D" for r in self._ranks) or "at least 2D"
        raise ValueError(
            f"expected {expected} input (got {rank}D input): "
            f"{type(self).__name__} takes {self._takes}, "
            f"received shape {tuple(input.shape)}"
        )

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, *args
    ) -> None:
        # Checkpoints of version 1 have no num_batches_tracked.
        version = local_metadata.get("version")
        if (version is None or version < 2) and self.track_running_stats:
            key = prefix + "num_batches_tracked"
            count = self.num_batches_tracked
            if count is None or count.is_meta:
                count = torch.tensor(0, dtype=torch.long)
            state_dict.setdefault(key, count)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, *args
        )


class BatchNorm(_ChannelNorm):
    """Batch normalization of (N, C) or (N, C, ...), any rank >= 2.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias`` for each channel.
    In training, mean and biased variance of the batch and its positions;
    in evaluation, the running statistics.

    Args:
        num_features: the number of channels, C.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics; None for
            the cumulative average over all batches so far.
        affine: whether there are a learned weight (starts at 1) and bias
            (at 0).
        track_running_stats: where False there are no running statistics,
            and evaluation uses the batch's.
        device: of parameters and buffers.
        dtype: likewise, floating point.
        bias: where False, an affine layer has a weight only.

    Buffers: ``running_mean`` and ``running_var`` (C,), the latter unbiased;
    ``num_batches_tracked``, which counts the training calls.

    Raises:
        ValueError: in ``forward``, for an input of another rank, or one
            value per channel in training; for the rest see
            :func:`normlib.functional.batch_norm`. A call that refuses its
            input leaves the buffers as they were.

    Ioffe & Szegedy (2015). Chapter 2.
    """

    _takes = "(N, C) or (N, C, ...)"

    def forward(self, input: Tensor) -> Tensor:
        """Normalize a batch; in training, also move the running statistics.

        Args:
            input: (N, C) or (N, C, ...).

        Returns:
            y in the shape, dtype and memory format of the input.
        """
        return self._forward(input)

    def _forward(self, input: Tensor, activation: str | None = None) -> Tensor:
        self._check_input_dim(input)
        mean, var = self.running_mean, self.running_var
        by_batch = self.training or (mean is None and var is None)
        if self.training and not self.track_running_stats:
            mean = var = None
        tracking = self.training and self.track_running_stats
        with self._all_or_nothing(tracking):
            y = functional.batch_norm(
                input,
                mean,
                var,
                self.weight,
                self.bias,
                by_batch,
                self._next_momentum() if tracking else 0.0,
                self.eps,
                activation=activation,
            )
            if tracking and self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return y

    def _all_or_nothing(self, tracking: bool) -> AbstractContextManager:
        """Statistics and counter move together, where the count matters.

        The recomputation of a checkpoint is broken off once it has what the
        backward needs, which is after the statistics have moved.
        """
        counted = tracking and self.momentum is None
        if not counted or torch.compiler.is_compiling():
            return nullcontext()
        return _restored(self.running_mean, self.running_var)

    def _next_momentum(self) -> float | Tensor:
        count = self.num_batches_tracked
        if self.momentum is not None:
            return self.momentum
        if count is None or self.running_mean is None:
            return 0.0
        if torch.compiler.is_compiling() or count.is_meta:
            # At least 32 bits: a bfloat16 cannot count past 256.
            dtype = self.running_mean.dtype
            dtype = torch.promote_types(dtype, torch.float32)
            return 1.0 / (count + 1).to(dtype)
        return 1.0 / (count.item() + 1)


class BatchNorm1d(BatchNorm):
    """Take (N, C) or (N, C, L), else as :class:`BatchNorm`.

    As :class:`torch.nn.BatchNorm1d`. Chapter 2.
    """

    _ranks = (2, 3)
    _takes = "(N, C) or (N, C, L)"


class BatchNorm2d(BatchNorm):
    """Take (N, C, H, W), else as :class:`BatchNorm`.

    As :class:`torch.nn.BatchNorm2d`. Chapter 2.
    """

    _ranks = (4,)
    _takes = "(N, C, H, W)"


class BatchNorm3d(BatchNorm):
    """Take (N, C, D, H, W), else as :class:`BatchNorm`.

    As :class:`torch.nn.BatchNorm3d`. Chapter 2.
    """

    _ranks = (5,)
    _takes = "(N, C, D, H, W)"


BATCH_NORMS = (BatchNorm, torch.nn.modules.batchnorm._BatchNorm)
"""The classes that count as batch norm: normlib's and torch.nn's."""


class _InstanceNorm(_ChannelNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats),
            *(device, dtype),
            bias=bias,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Normalize each channel of each instance.

        Args:
            input: (N, C, ...), or (C, ...) for one instance.

        Returns:
            y in the shape and dtype of the input, and the memory format of
            :func:`normlib.functional.instance_norm`.
        """
        return self._forward(input)

    def _forward(self, input: Tensor, activation: str | None = None) -> Tensor:
        self._check_input_dim(input)
        single = input.dim() == self._ranks[0]
        self._check_channels(input, 0 if single else 1)
        y = functional.instance_norm(
            input.unsqueeze(0) if single else input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
            activation=activation,
        )
        return y.squeeze(0) if single else y

    def _check_channels(self, input: Tensor, axis: int) -> None:
        size = input.shape[axis]
        if size == self.num_features:
            return
        said = (
            f"expected input's size at dim={axis} to match num_features "
            f"({self.num_features}), but got: {size} in shape "
            f"{tuple(input.shape)}"
        )
        if self.affine:
            raise ValueError(said)
        warnings.warn(
            f"{said}. Without affine it makes no difference.", stacklevel=3
        )

    def _load_from_state_dict(
        self,
        state_dict,
        prefix,
        local_metadata,
        strict,
        missing_keys,
        unexpected_keys,
        error_msgs,
    ) -> None:
        # Before torch 0.4 every instance norm kept running statistics.
        names = [prefix + name for name in ("running_mean", "running_var")]
        stale = [key for key in names if key in state_dict]
        if (
            stale
            and local_metadata.get("version") is None
            and not self.track_running_stats
        ):
            error_msgs.append(
                f"Unexpected running statistics {' and '.join(stale)} for "
                f"{type(self).__name__} with track_running_stats=False, "
                "in a checkpoint without a version (torch before 0.4 wrote "
                "them for every layer): remove the keys, or set "
                "track_running_stats=True"
            )
            for key in stale:
                state_dict.pop(key)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )


class InstanceNorm1d(_InstanceNorm):
    """Normalize each channel of each instance of (N, C, L) or (C, L).

    ``y = (x - mean) / sqrt(var + eps) * weight + bias`` with mean and biased
    variance over the positions of one channel of one instance, in training
    and in evaluation. With ``track_running_stats``, evaluation uses running
    statistics, as batch norm does.

    Args:
        num_features: the number of channels, C.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics; None
            leaves them as they are.
        affine: whether there are a learned weight (starts at 1) and bias
            (at 0).
        track_running_stats: whether there are running statistics.
        device: of parameters and buffers.
        dtype: likewise, floating point.
        bias: where False, an affine layer has a weight only.

    Buffers: those of :class:`BatchNorm`; ``num_batches_tracked`` stays 0.

    Raises:
        ValueError: in ``forward``, for an input of another rank, another
            number of channels in an affine layer (in one that is not, a
            warning), or one position; for the rest see
            :func:`normlib.functional.instance_norm`.

    As :class:`torch.nn.InstanceNorm1d`. Ulyanov, Vedaldi & Lempitsky (2016).
    Chapter 5.
    """

    _ranks = (2, 3)
    _takes = "(N, C, L) or (C, L)"


class InstanceNorm2d(_InstanceNorm):
    """Take (N, C, H, W) or (C, H, W), else as :class:`InstanceNorm1d`.

    As :class:`torch.nn.InstanceNorm2d`. Chapter 5.
    """

    _ranks = (3, 4)
    _takes = "(N, C, H, W) or (C, H, W)"


class InstanceNorm3d(_InstanceNorm):
    """Take (N, C, D, H, W) or (C, D, H, W), else as :class:`InstanceNorm1d`.

    As :class:`torch.nn.InstanceNorm3d`. Chapter 5.
    """

    _ranks = (4, 5)
    _takes = "(N, C, D, H, W) or (C, D, H, W)"


class GroupNorm(Module):
    """Normalize each group of channels of each instance of (N, C, ...).

    ``y = (x - mean) / sqrt(var + eps) * weight + bias`` with mean and biased
    variance over the channels of a group and their positions. Training and
    evaluation are the same.

    Args:
        num_groups: G, a divisor of C; neighbouring channels form a group.
        num_channels: C.
        eps: added to the variance.
        affine: whether there are a learned weight (starts at 1) and bias
            (at 0), one for each channel.
        device: of the parameters.
        dtype: likewise, floating point.
        bias: where False, an affine layer has a weight only.

    Raises:
        ValueError: G is not a positive divisor of C. For ``forward`` see
            :func:`normlib.functional.group_norm`.

    As :class:`torch.nn.GroupNorm`. Wu & He (2018). Chapter 5.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if num_groups <= 0 or num_channels % num_groups:
            raise ValueError(
                f"num_channels={num_channels} is not divisible by "
                f"num_groups={num_groups}"
            )
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.affine = affine

        def empty():
            return Parameter(
                torch.empty(num_channels, device=device, dtype=dtype)
            )

        self.register_parameter("weight", empty() if affine else None)
        self.register_parameter("bias", empty() if affine and bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        _reset(self.weight, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize groups of channels.

        Args:
            input: (N, C) or (N, C, ...).

        Returns:
            y in the shape and dtype of the input, and on a CPU in its memory
            format (torch's kernel for CUDA has one of its own).
        """
        return self._forward(input)

    def _forward(self, input: Tensor, activation: str | None = None) -> Tensor:
        return functional.group_norm(
            *(input, self.num_groups, self.weight, self.bias, self.eps),
            activation=activation,
        )

    def extra_repr(self) -> str:
        """The constructor's arguments, in the words of torch.nn's repr."""
        bias = f", bias={self.bias is not None}"
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, "
            f"affine={self.affine}{bias if _GROUP_NORM_SHOWS_BIAS else ''}"
        )


class _TrailingNorm(Module):
    """What layer and RMS norm share: parameters of the normalized shape."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None,
        elementwise_affine: bool,
        device,
        dtype,
        parameters: dict[str, bool],
    ) -> None:
        super().__init__()
        if isinstance(normalized_shape, numbers.Integral):
            normalized_shape = (normalized_shape,)
        self.normalized_shape = tuple(normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        for name, wanted in parameters.items():
            empty = torch.empty(
                self.normalized_shape, device=device, dtype=dtype
            )
            self.register_parameter(name, Parameter(empty) if wanted else None)
        self.reset_parameters()

    def extra_repr(self) -> str:
        """The constructor's arguments, in the words of torch.nn's repr."""
        return (
            f"{self.normalized_shape}, eps={self.eps}, "
            f"elementwise_affine={self.elementwise_affine}"
        )


class LayerNorm(_TrailingNorm):
    """Normalize each vector (or block) of the trailing axes by itself.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias`` with mean and biased
    variance over the axes of ``normalized_shape``. Training and evaluation
    are the same.

    Args:
        normalized_shape: the sizes of the trailing axes; an integer for the
            last axis alone.
        eps: added to the variance.
        elementwise_affine: whether there are a learned weight (starts at 1)
            and bias (at 0), one for each entry.
        bias: where False, an affine layer has a weight only.
        device: of the parameters.
        dtype: likewise, floating point.

    Raises:
        RuntimeError: in ``forward``, for an input that does not end in
            ``normalized_shape``; see :func:`normlib.functional.layer_norm`.

    As :class:`torch.nn.LayerNorm`. Ba, Kiros & Hinton (2016). Chapter 5.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        affine = elementwise_affine
        parameters = {"weight": affine, "bias": affine and bias}
        super().__init__(
            normalized_shape, eps, affine, device, dtype, parameters
        )

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        _reset(self.weight, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the trailing axes.

        Args:
            input: (..., D), D as in ``normalized_shape``.

        Returns:
            y in the shape and dtype of the input.
        """
        return self._forward(input)

    def _forward(self, input: Tensor, activation: str | None = None) -> Tensor:
        return functional.layer_norm(
            *(input, self.normalized_shape, self.weight, self.bias, self.eps),
            activation=activation,
        )

    def extra_repr(self) -> str:
        """The constructor's arguments, in the words of torch.nn's repr."""
        bias = f", bias={self.bias is not None}"
        return super().extra_repr() + (bias if _LAYER_NORM_SHOWS_BIAS else "")


class RMSNorm(_TrailingNorm):
    """Divide each vector (or block) of the trailing axes by its size.

    ``y = x / sqrt(mean(x^2) + eps) * weight``: layer norm without the mean
    and without a bias. Training and evaluation are the same.

    Args:
        normalized_shape: the sizes of the trailing axes; an integer for the
            last axis alone.
        eps: added to the mean square; None for the spacing of the numbers
            at 1 in the dtype of the arithmetic (float32 for 16 bits). Models
            differ in it: Llama has 1e-5 or 1e-6.
        elementwise_affine: whether there is a learned weight (starts at 1).
        device: of the parameter.
        dtype: likewise, floating point.

    Raises:
        RuntimeError: in ``forward``, for an input that does not end in
            ``normalized_shape``; see :func:`normlib.functional.rms_norm`.

    As :class:`torch.nn.RMSNorm`. Zhang & Sennrich (2019). Chapter 5.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        affine = elementwise_affine
        super().__init__(
            normalized_shape, eps, affine, device, dtype, {"weight": affine}
        )

    def reset_parameters(self) -> None:
        """Weight 1."""
        _reset(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the trailing axes.

        Args:
            x: (..., D), D as in ``normalized_shape``.

        Returns:
            y in the shape and dtype of x.
        """
        return self._forward(x)

    def _forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        return functional.rms_norm(
            *(x, self.normalized_shape, self.weight, self.eps),
            activation=activation,
        )


class AddLayerNorm(LayerNorm):
    """Add a residual, and normalize the sum by :class:`LayerNorm`.

    ``total = input + residual; y = layer_norm(total)``, in one kernel where
    a backend has one that pays. Constructor, parameters and keys are those of
    :class:`LayerNorm`::

        y, x = self.norm(self.attention(y), x)

    See :func:`normlib.functional.add_layer_norm`. Chapter 10.
    """

    def forward(
        self, input: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add, and normalize the trailing axes.

        Args:
            input: (..., D), D as in ``normalized_shape``.
            residual: of the same shape.

        Returns:
            y and the sum.
        """
        return functional.add_layer_norm(
            *(input, residual, self.normalized_shape),
            *(self.weight, self.bias, self.eps),
        )


class AddRMSNorm(RMSNorm):
    """Add a residual, and normalize the sum by :class:`RMSNorm`.

    ``total = input + residual; y = rms_norm(total)``, otherwise as
    :class:`AddLayerNorm`. See :func:`normlib.functional.add_rms_norm`.
    Chapter 10.
    """

    def forward(
        self, input: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add, and normalize, as :meth:`AddLayerNorm.forward` does."""
        return functional.add_rms_norm(
            *(input, residual, self.normalized_shape),
            *(self.weight, self.eps),
        )


class NormActivation(Sequential):
    """A norm and the ReLU or SiLU behind it, in one step where that pays.

    ``NormActivation(GroupNorm(32, 320), torch.nn.SiLU())`` is
    :class:`torch.nn.Sequential` of the two: constructor, children, keys,
    what tracing, folding and conversion make of it, and its output. Only
    where a backend may do both in one kernel, and nobody looks on, the two
    are one call with the keyword ``activation`` of
    :mod:`normlib.functional`. (A 16-bit output is then rounded once, not
    twice.)

    With other modules than a layer of normlib and :class:`torch.nn.ReLU` or
    :class:`torch.nn.SiLU`, given or put there later, and with hooks on them,
    it is a ``Sequential`` and no more. Chapter 10.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize, then activate.

        Args:
            input: as the norm takes it.

        Returns:
            y in the shape and dtype of the input, and the norm's memory
            format.
        """
        if not functional.fusible(input) or not self._alone():
            return super().forward(input)
        norm, act = self
        return norm._forward(input, _ACTIVATIONS[type(act)])

    def _alone(self) -> bool:
        """Whether it holds a norm and an activation that nobody watches."""
        return (
            len(self) == 2
            and type(self[0]) in _NORMS
            and type(self[1]) in _ACTIVATIONS
            and not any(map(_watched, self))
        )


_NORMS = (
    *(BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d),
    *(InstanceNorm1d, InstanceNorm2d, InstanceNorm3d),
    *(GroupNorm, LayerNorm, RMSNorm),
)
_ACTIVATIONS = {torch.nn.ReLU: "relu", torch.nn.SiLU: "silu"}


def _watched(module: Module) -> bool:
    """Whether a call of a module is more than its class's forward."""
    return (
        "forward" in vars(module)
        or _hooked_everywhere()
        or any(getattr(module, name, None) for name in _HOOKS)
    )


_hooked_everywhere = getattr(
    torch.nn.modules.module, "_has_any_global_hook", lambda: True
)
_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks"),
    *("_backward_hooks", "_backward_pre_hooks"),
    "_compiled_call_impl",
)


@contextmanager
def _restored(*buffers: Tensor | None) -> Iterator[None]:
    """Give buffers their values back where the block is not finished."""
    before = [(b, b.clone()) for b in buffers if b is not None]
    try:
        yield
    except BaseException:
        for buffer, old in before:
            buffer.data.copy_(old)
        raise


def _reset(weight: Parameter | None, bias: Parameter | None = None) -> None:
    if weight is not None:
        torch.nn.init.ones_(weight)
    if bias is not None:
        torch.nn.init.zeros_(bias)
