"""Batch normalization at test time: which statistics stand for the batch's.

In training a batch-norm layer keeps running averages of its batches'
statistics, and uses them in evaluation. :func:`recalibrate_batch_norm` puts
the statistics of a whole data set in their place, :func:`adapt_batch_norm`
those of the test data, for a while; :func:`freeze_batch_norm` keeps what
there is. :func:`normlib.folding.fold_batch_norm`, which stands here too, puts
them into the layer before.

They take models with the layers of normlib or of torch.nn.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from normlib.axes import channel_view, stat_axes
from normlib.folding import fold_batch_norm, plan_folding
from normlib.modules import BATCH_NORMS, BatchNorm
from normlib.progress import progress
from normlib.stats import Moments, Population
from normlib.variants import (
    BatchRenorm,
    GhostBatchNorm,
    LpBatchNorm,
    NoisyBatchNorm,
)

__all__ = [
    "FrozenBatchNorm",
    "adapt_batch_norm",
    "fold_batch_norm",
    "freeze_batch_norm",
    "plan_folding",
    "recalibrate_batch_norm",
]


def recalibrate_batch_norm(
    model: nn.Module, batches: Iterable, *, progress: bool = True
) -> nn.Module:
    """Set running statistics to those of all values in some batches.

    Also known as precise batch norm. The batches pass through the model once,
    in evaluation mode but for batch norm, which normalizes by the batch as in
    training. The inputs of each batch-norm layer are merged exactly, in
    float64: batches may differ in size, and a layer that is called several
    times is one population. Then ``running_mean`` takes the mean of all
    values, and ``running_var`` their unbiased variance. From the second layer
    on the inputs depend on the batches, so these should be large and random.

    A batch with one value per channel cannot be normalized by itself; it is
    normalized by what has been merged so far. A layer that these batches do
    not reach keeps its statistics. Momentum and ``num_batches_tracked`` stay
    as they are.

    Args:
        model: with layers of batch norm, at any depth.
        batches: of ``x``, of ``(x, y)`` or longer (the first is used), or of
            dictionaries of the model's keyword arguments. They are moved to
            the model's device. The more values the better: 1,000 to 10,000
            examples are enough in the paper.
        progress: whether to show a progress bar, once it takes more than two
            seconds, where tqdm is installed.

    Returns:
        The model, changed in place. After any error it is as it was before,
        and always in the modes it was in.

    Raises:
        TypeError: batches is a single tensor.
        ValueError: no batch; no layer of batch norm with running statistics,
            or none that the batches reach; values that are not finite, or
            whose statistics the layer's dtype cannot hold; a layer whose
            ``running_var`` is not a variance, or that is lazy and has no
            values yet; one value per channel in the first batch.

    Wu & Johnson (2021). Chapter 4.
    """
    layers = _tracking(model)
    _check_variances(layers)
    _check_batches(batches)
    with ExitStack() as stack:
        stack.enter_context(_evaluation(model))
        stack.enter_context(_without_statistics(layers))
        seen = stack.enter_context(_watched(layers))
        count = _run(model, batches, progress)
    if count == 0:
        raise ValueError("no batch to recalibrate from: batches is empty")
    _check_seen(seen, layers)
    _store(seen)
    return model


@contextmanager
def adapt_batch_norm(
    model: nn.Module, batches: Iterable | None = None, *, progress=True
) -> Iterator[nn.Module]:
    """Normalize by the statistics of the test data, inside a ``with``.

    Given batches of the domain to evaluate on (no labels needed), layers of
    batch norm use their statistics as by :func:`recalibrate_batch_norm`.
    Given none, each test batch is normalized by itself; then a prediction
    depends on the batch around it, and a batch of one class misleads. Outside
    the running statistics are what they were.

    Args:
        model: in any mode; inside, it is in evaluation mode.
        batches: as for :func:`recalibrate_batch_norm`, or None.
        progress: likewise.

    Yields:
        The model.

    Raises:
        TypeError: see :func:`recalibrate_batch_norm`.
        ValueError: likewise.

    Li et al. (2018), Nado et al. (2020). Chapter 4.
    """
    layers = _tracking(model)
    with ExitStack() as stack:
        stack.enter_context(_evaluation(model))
        if batches is None:
            stack.enter_context(_without_statistics(layers))
        else:
            stack.enter_context(_statistics_kept(layers))
            recalibrate_batch_norm(model, batches, progress=progress)
        yield model


def freeze_batch_norm(model: nn.Module, *, affine: bool = True) -> nn.Module:
    """Make batch norm stay in evaluation mode, whatever the model is put in.

    It uses the running statistics in training too, and does not move them:
    for fine-tuning with small batches, or with the statistics of an earlier
    data set. Each layer becomes a :class:`FrozenBatchNorm`, which is no
    longer an instance of torch.nn's classes, and is otherwise the same
    object, with its parameters, buffers and hooks.

    Args:
        model: changed in place.
        affine: whether to freeze weight and bias too, so that they take no
            gradient.

    Returns:
        The model.

    Raises:
        TypeError: a layer is of a subclass with a forward of its own, or
            parametrized.
        ValueError: no layer of batch norm with running statistics, or one
            that is lazy and has no values yet.

    After these errors nothing has changed.

    Chapter 4.
    """
    layers = _tracking(model)
    for layer, name in layers.items():
        _check_plain(name, layer)
    for layer in layers:
        layer.__class__ = FrozenBatchNorm
        layer.eval()
        if affine:
            layer.requires_grad_(False)
    return model


class FrozenBatchNorm(BatchNorm):
    """Batch normalization that stays in evaluation mode.

    By the running statistics, which never move, whatever mode the model
    around it is put in. :func:`freeze_batch_norm` makes one of a layer.

    Chapter 4.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.training = False

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        """Stay in evaluation mode."""
        return super().train(False)


def _check_plain(name: str, layer: nn.Module) -> None:
    if type(layer).forward not in _FORWARDS or is_parametrized(layer):
        raise TypeError(
            f"cannot freeze layer {name!r}, a {_class(layer)}: only layers "
            "with the forward of normlib's or torch.nn's batch norm, and "
            "without parametrizations, can be frozen"
        )


def _tracking(model: nn.Module) -> dict[nn.Module, str]:
    """The layers of batch norm with running statistics, and their names."""
    layers = {
        module: name or _class(module)
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None
    }
    if not layers:
        raise ValueError(
            "no layer of batch norm with running statistics in "
            f"{_class(model)}"
        )
    for layer, name in layers.items():
        if is_lazy(layer.running_mean):
            raise ValueError(
                f"layer {name!r}, a {_class(layer)}, has no values yet: run "
                "the model once first"
            )
    return layers


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and back in its own."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _without_statistics(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Take running statistics away, and put them back.

    In evaluation mode a layer without them normalizes by the batch, and
    nothing else of training happens: no noise, no average that moves.
    """
    kept = {layer: dict(layer._buffers) for layer in layers}
    try:
        for layer in kept:
            _put(layer, None, None)
        yield
    finally:
        for layer, buffers in kept.items():
            layer._buffers.update(buffers)


@contextmanager
def _statistics_kept(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Give running statistics the values back that they have now.

    Into the buffers that there are then: ``model.half()`` makes others.
    """
    kept = [
        (layer, name, layer.get_buffer(name).clone())
        for layer in layers
        for name in ("running_mean", "running_var")
    ]
    try:
        yield
    finally:
        for layer, name, value in kept:
            layer.get_buffer(name).data.copy_(value)


@contextmanager
def _watched(layers: dict) -> Iterator[dict[nn.Module, Population]]:
    """Merge what goes into each layer, for as long as this is open."""
    seen = {layer: Population() for layer in layers}

    def before(layer, args, kwargs):
        values = (*args, *kwargs.values())
        x = next((v for v in values if isinstance(v, Tensor)), None)
        if x is None or x.dim() < 2 or x.numel() == 0:
            return  # the layer's own error is the better one
        batch = _moments(x.detach())
        if batch.count == 1:
            _lend(layer, layers[layer], seen[layer])
        seen[layer].update(batch)

    def after(layer, args, y):
        _put(layer, None, None)

    handles = []
    try:
        for layer in layers:
            handles += [
                layer.register_forward_pre_hook(before, with_kwargs=True),
                layer.register_forward_hook(after),
            ]
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _moments(x: Tensor) -> Moments:
    """The moments of each channel, (C,), in float64."""
    if x.device.type == "mps":  # which has no float64
        x = x.cpu()
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x.reshape(channel_view(x.shape))
    count, *found = Moments.of(x, stat_axes(True), dtype=torch.float64)
    return Moments(count, *(p.flatten() for p in found))


def _lend(layer: nn.Module, name: str, seen: Population) -> None:
    """Normalize one value per channel by what has been merged so far."""
    if seen.count == 0:
        raise ValueError(
            "the first batch must have more than one value per channel, but "
            f"layer {name!r} received one: nothing to normalize it by"
        )
    like = next((p for p in layer.parameters()), seen.mean)
    _put(layer, seen.mean.to(like), seen.unbiased_var.to(like))


def _put(layer: nn.Module, mean: Tensor | None, var: Tensor | None) -> None:
    layer._buffers.update(running_mean=mean, running_var=var)


@torch.no_grad()
def _run(model: nn.Module, batches: Iterable, show: bool) -> int:
    """Pass the batches through the model; say how many there were."""
    tensors = (*model.parameters(), *model.buffers())
    device = next((t.device for t in tensors), None)
    count = 0
    # Code that was compiled without the hooks would not call them.
    with torch.compiler.set_stance("force_eager"):
        for batch in progress(batches, "statistics", "batches", show):
            args, kwargs = _inputs(batch, device)
            model(*args, **kwargs)
            count += 1
    return count


def _inputs(batch: Any, device) -> tuple[tuple, dict]:
    if isinstance(batch, Mapping):
        return (), {key: _moved(value, device) for key, value in batch.items()}
    x = batch[0] if isinstance(batch, (tuple, list)) else batch
    return (_moved(x, device),), {}


def _moved(value: Any, device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _check_batches(batches: Iterable) -> None:
    if isinstance(batches, Tensor):
        raise TypeError(
            "batches must be an iterable of batches, but got one tensor of "
            f"shape {tuple(batches.shape)}: put it in a list"
        )


def _check_variances(layers: dict) -> None:
    for layer, name in layers.items():
        if isinstance(layer, LpBatchNorm) and not (
            layer.p == 2 and not layer.before_shift
        ):
            raise ValueError(
                f"running_var of layer {name!r}, a {layer}, is not a "
                "variance: it cannot be recalibrated"
            )


def _check_seen(seen: dict[nn.Module, Population], layers: dict) -> None:
    reached = {m: found for m, found in seen.items() if found.count}
    if not reached:
        raise ValueError("the batches reach no layer of batch norm")
    for layer, found in reached.items():
        if not (found.mean.isfinite() & found.var.isfinite()).all():
            raise ValueError(
                f"layer {layers[layer]!r} received values that are not finite"
            )
        if not all(new.isfinite().all() for _, new in _new(layer, found)):
            raise ValueError(
                f"layer {layers[layer]!r} received values whose statistics "
                f"{layer.running_var.dtype} cannot hold"
            )


@torch.no_grad()
def _store(seen: dict[nn.Module, Population]) -> None:
    """Move the running statistics: all or, after an error, none."""
    moved = []
    try:
        for layer, found in seen.items():
            for old, new in _new(layer, found) if found.count else ():
                moved.append((old, old.clone()))
                old.copy_(new)
    except BaseException:
        for buffer, value in moved:
            with suppress(RuntimeError):  # the one that takes no value
                buffer.copy_(value)
        raise


def _new(layer: nn.Module, found: Population) -> list[tuple[Tensor, Tensor]]:
    """The running statistics, and what they are to be, in their dtype."""
    pairs = (
        (layer.running_mean, found.mean),
        (layer.running_var, found.unbiased_var),
    )
    return [(old, new.to(old)) for old, new in pairs]


def _class(module: nn.Module) -> str:
    return type(module).__name__


_FORWARDS = {
    *(c.forward for c in (nn.BatchNorm1d, nn.SyncBatchNorm, BatchNorm)),
    *(c.forward for c in (NoisyBatchNorm, GhostBatchNorm)),
    *(c.forward for c in (LpBatchNorm, BatchRenorm)),
}
"""Of the layers whose evaluation is that of batch norm."""
