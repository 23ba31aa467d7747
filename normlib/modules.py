"""The norms as layers: torch.nn's constructors, keys, repr and errors.

The classes are :class:`torch.nn.Module` subclasses of our own. That each is a
drop-in for its namesake in torch.nn is tested, not inherited.
"""

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from normlib import functional

_REPR_SHOWS_BIAS = "bias=" in repr(torch.nn.BatchNorm1d(1))


class BatchNorm(Module):
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

    _version = 2
    _ranks: tuple[int, ...] = ()
    _takes = "(N, C) or (N, C, ...)"

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
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize a batch; in training, also move the running statistics.

        Args:
            input: (N, C) or (N, C, ...).

        Returns:
            y in the shape, dtype and memory format of the input.
        """
        self._check_input_dim(input)
        mean, var = self.running_mean, self.running_var
        by_batch = self.training or (mean is None and var is None)
        if self.training and not self.track_running_stats:
            mean = var = None
        tracking = self.training and self.track_running_stats
        y = functional.batch_norm(
            input,
            mean,
            var,
            self.weight,
            self.bias,
            by_batch,
            self._next_momentum() if tracking else 0.0,
            self.eps,
        )
        if tracking and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return y

    def extra_repr(self) -> str:
        """The constructor's arguments, in the words of torch.nn's repr."""
        bias = f"bias={self.bias is not None}, " if _REPR_SHOWS_BIAS else ""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, {bias}"
            f"track_running_stats={self.track_running_stats}"
        )

    def _next_momentum(self) -> float | Tensor:
        if self.momentum is not None:
            return self.momentum
        if self.num_batches_tracked is None or self.running_mean is None:
            return 0.0
        # At least 32 bits: a bfloat16 cannot count past 256.
        dtype = torch.promote_types(self.running_mean.dtype, torch.float32)
        return 1.0 / (self.num_batches_tracked + 1).to(dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        rank = input.dim()
        if rank >= 2 and (not self._ranks or rank in self._ranks):
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


class BatchNorm1d(BatchNorm):
    """Take (N, C) or (N, C, L), as :class:`torch.nn.BatchNorm1d` does.

    Chapter 2.
    """

    _ranks = (2, 3)
    _takes = "(N, C) or (N, C, L)"


class BatchNorm2d(BatchNorm):
    """Take (N, C, H, W), as :class:`torch.nn.BatchNorm2d` does.

    Chapter 2.
    """

    _ranks = (4,)
    _takes = "(N, C, H, W)"


class BatchNorm3d(BatchNorm):
    """Take (N, C, D, H, W), as :class:`torch.nn.BatchNorm3d` does.

    Chapter 2.
    """

    _ranks = (5,)
    _takes = "(N, C, D, H, W)"
