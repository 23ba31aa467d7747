"""Carry layers and weights from one library, or one norm, to another.

:func:`from_torch` and :func:`to_torch` exchange the norms of a whole model
with those of torch.nn. :func:`replace_modules` puts any module in the place
of another; :func:`batch_norm_to_group_norm` is an example. The rest carries a
batch norm from Keras or flax and back. What differs there:

===================== ====== ===== ============ ================
library               eps    decay channel axis running variance
===================== ====== ===== ============ ================
torch and normlib     1e-5   0.9   1            unbiased
Keras 3               1e-3   0.99  -1           biased
flax (linen)          1e-5   0.99  -1           biased
TensorFlow's fused op 1e-3   0     -1           unbiased
===================== ====== ===== ============ ================

The decay is the weight of the past in the running statistics, which Keras and
flax call momentum. torch's momentum is the weight of the new batch.
"""

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.nn import Module

from normlib import modules


class Convention(NamedTuple):
    """What a library's batch norm has by default, and what it stores.

    ``eps`` is added to the variance; ``decay`` is the weight of the past in
    the running statistics; ``unbiased`` says of which kind the running
    variance is.
    """

    eps: float
    decay: float
    channel_axis: int
    unbiased: bool


CONVENTIONS = {
    "torch": Convention(1e-5, 0.9, 1, unbiased=True),
    "keras": Convention(1e-3, 0.99, -1, unbiased=False),
    "flax": Convention(1e-5, 0.99, -1, unbiased=False),
    "tensorflow": Convention(1e-3, 0.0, -1, unbiased=True),
}
"""The table of the module's docstring, for code to read. The last row is
``tf.compat.v1.nn.fused_batch_norm``."""

_TWINS = {
    getattr(torch.nn, name): getattr(modules, name)
    for name in (
        "BatchNorm1d",
        "BatchNorm2d",
        "BatchNorm3d",
        "InstanceNorm1d",
        "InstanceNorm2d",
        "InstanceNorm3d",
        "GroupNorm",
        "LayerNorm",
        "RMSNorm",
    )
}


def from_torch(model: Module) -> Module:
    """Make normlib's layers of a model's norms from torch.nn, in place.

    Each layer changes its class and nothing else: it stays the same object
    with the same parameters, buffers, mode and hooks. So an optimizer goes
    on, layers and parameters that are shared stay shared, and checkpoints
    fit as before.

    Only the layers of torch.nn themselves are taken. What is a class of its
    own stays as it is: SyncBatchNorm, lazy layers before their first call,
    parametrized and scripted ones, and other people's subclasses and norms,
    for which there is :func:`replace_modules`.

    Args:
        model: with such layers at any depth, or such a layer.

    Returns:
        The model itself.

    Chapter 4.
    """
    return _exchange(model, _TWINS)


def to_torch(model: Module) -> Module:
    """Undo :func:`from_torch`: make torch.nn's layers of ours, in place.

    The variants of :mod:`normlib.variants` have no namesake in torch.nn and
    stay as they are, like other subclasses of our layers.

    Args:
        model: with layers of normlib at any depth, or such a layer.

    Returns:
        The model itself.

    Raises:
        ValueError: the model has a :class:`normlib.BatchNorm`, which takes
            any rank, as no layer of torch.nn does. The model is as it was.

    Chapter 4.
    """
    for name, module in model.named_modules():
        if type(module) is modules.BatchNorm:
            raise ValueError(
                f"layer {name!r} is a BatchNorm of any rank, which torch.nn "
                "has not: replace it by BatchNorm1d, BatchNorm2d or "
                "BatchNorm3d first"
            )
    return _exchange(model, {ours: torchs for torchs, ours in _TWINS.items()})


def _exchange(model: Module, classes: dict[type, type]) -> Module:
    # Twins have the same attributes, so that the class is all that differs.
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
    return model


def replace_modules(
    model: Module, rule: Callable[[str, Module], Module | None]
) -> Module:
    """Put other modules in the place of some, in place.

    For the RMS norm of a Llama, which is a class of its own::

        def rule(name, module):
            if isinstance(module, LlamaRMSNorm):
                shape = module.weight.shape
                norm = normlib.RMSNorm(shape, eps=module.variance_epsilon)
                norm.weight = module.weight
                return norm

    Each module is asked about once, under its first name, parents before
    children. The inside of one that is replaced is not asked about, nor that
    of its replacement or of a scripted module. A module that stands in several
    places is replaced in all of them. What the rule makes is set to the mode
    (train or eval) of the module whose place it takes.

    Args:
        model: to be changed; cycles are allowed.
        rule: takes a name, ``""`` for the model itself, and a module; returns
            what takes its place, or None to leave it.

    Returns:
        The model, or what the rule puts in its place.

    Raises:
        TypeError: the rule returned something else.
        ValueError: what is to be replaced is compiled by itself.

    After these errors, and any that the rule raises, the model is as it was.
    Chapter 4.
    """
    answers: dict[Module, Module] = {}
    places = []

    def visit(name: str, module: Module) -> None:
        if module in answers:
            return
        answers[module] = _answer(rule, name, module)
        scripted = isinstance(module, torch.jit.ScriptModule)
        if answers[module] is not module or scripted:
            return
        for key, child in module._modules.items():
            if child is not None:
                places.append((module, key, child))
                visit(f"{name}.{key}" if name else key, child)

    known = set(model.modules())
    visit("", model)
    _check_compiled(places, answers)
    for old, new in answers.items():
        for module in set(new.modules()) - known if new is not old else ():
            module.training = old.training
    for parent, key, child in places:
        parent._modules[key] = answers[child]
    return answers[model]


def _check_compiled(places, answers) -> None:
    for _, key, child in places:
        if key == "_orig_mod" and answers[child] is not child:
            raise ValueError(
                f"{child} is compiled by itself, and its code would stay: "
                "replace it before torch.compile"
            )


def _answer(rule: Callable, name: str, module: Module) -> Module:
    answer = rule(name, module)
    if answer is None:
        return module
    if not isinstance(answer, Module):
        raise TypeError(
            f"expected a module or None in the place of {name!r} "
            f"({type(module).__name__}), received {type(answer).__name__}"
        )
    return answer


_GROUP_NORMS = {
    modules.BatchNorm: modules.GroupNorm,
    modules.BatchNorm1d: modules.GroupNorm,
    modules.BatchNorm2d: modules.GroupNorm,
    modules.BatchNorm3d: modules.GroupNorm,
    torch.nn.BatchNorm1d: torch.nn.GroupNorm,
    torch.nn.BatchNorm2d: torch.nn.GroupNorm,
    torch.nn.BatchNorm3d: torch.nn.GroupNorm,
    torch.nn.SyncBatchNorm: torch.nn.GroupNorm,
}
_OF_IMAGES = ("BatchNorm2d", "BatchNorm3d")


def batch_norm_to_group_norm(
    model: Module, num_groups: int | Callable[[int], int] = 32
) -> Module:
    """Make group norm of a model's batch norm, in place.

    Of ours normlib's, of torch.nn's (SyncBatchNorm too) torch.nn's; their
    subclasses stay. Weight and bias are the same objects, eps and the mode
    are kept. The running statistics go, with their keys. The model computes
    something else now, and has to be trained on.

    Args:
        model: with batch norm at any depth, or a layer of batch norm.
        num_groups: of every layer; or a function from channels to groups,
            such as ``lambda c: c // 16`` or ``lambda c: math.gcd(c, 32)``.

    Returns:
        The model, or the new layer where the model was a layer.

    Raises:
        ValueError: in a layer, which is named, the groups do not divide the
            channels; or each channel of what may be ``(N, C)`` is a group of
            its own, so that every value is its own mean; or there are hooks,
            which the new layer would not have. The model is as it was.

    Wu & He (2018). Chapter 4.
    """

    def rule(name: str, module: Module) -> Module | None:
        if type(module) not in _GROUP_NORMS:
            return None
        channels = module.num_features
        groups = num_groups(channels) if callable(num_groups) else num_groups
        _check_groups(name, module, groups)
        new = _GROUP_NORMS[type(module)](
            groups, channels, module.eps, affine=False
        )
        new.affine = module.affine
        new.weight, new.bias = module.weight, module.bias
        return new

    return replace_modules(model, rule)


def _check_groups(name: str, module: Module, groups: int) -> None:
    channels, layer = module.num_features, type(module).__name__
    where = f"layer {name!r} ({layer}): num_channels={channels}"
    if groups <= 0 or channels % groups:
        raise ValueError(
            f"{where} is not divisible by num_groups={groups}; num_groups "
            "may be a function, such as lambda c: math.gcd(c, 32)"
        )
    if groups == channels and layer not in _OF_IMAGES:
        raise ValueError(
            f"{where} in num_groups={groups} are groups of one channel, "
            "which leave nothing but the bias of an input (N, C)"
        )
    if any(value for key, value in vars(module).items() if "_hooks" in key):
        raise ValueError(
            f"layer {name!r} ({layer}) has hooks, which its replacement "
            "would not have: remove them first"
        )


def momentum_from_decay(decay: float) -> float:
    """Turn Keras' and flax' momentum into torch's: 0.99 becomes 0.01.

    Exact in decimal digits, so that nothing like 0.010000000000000009 gets
    into a layer.

    Args:
        decay: weight of the past in the running statistics, 0 to 1.

    Returns:
        The weight of the new batch.

    Raises:
        ValueError: it is not between 0 and 1.

    Chapter 4.
    """
    return _complement("decay", decay)


def decay_from_momentum(momentum: float) -> float:
    """Turn torch's momentum into that of Keras and flax: 0.1 becomes 0.9.

    Args:
        momentum: weight of the new batch in the running statistics, 0 to 1.

    Returns:
        The weight of the past.

    Raises:
        ValueError: it is None, torch's cumulative average, which has no
            fixed weights; or not between 0 and 1.

    Chapter 4.
    """
    if momentum is None:
        raise ValueError(
            "momentum=None is a cumulative average: the weight of the past "
            "is not a fixed number"
        )
    return _complement("momentum", momentum)


def _complement(name: str, weight: float) -> float:
    if not 0 <= weight <= 1:
        raise ValueError(f"expected 0 <= {name} <= 1, received {weight}")
    return float(1 - Decimal(str(float(weight))))


def from_keras_batch_norm(
    config: Mapping[str, Any],
    weights: Sequence[Any],
    *,
    count: int | None = None,
) -> modules.BatchNorm:
    """Make a layer of a Keras BatchNormalization.

    ``from_keras_batch_norm(layer.get_config(), layer.get_weights())``. Ours
    has its channels on axis 1: where Keras' has ``axis=-1``, give it
    ``x.movedim(-1, 1)``.

    The values are taken as they are, so that evaluation is the same. The
    running variance is the biased one of Keras 3 then. With ``count`` it
    becomes what torch would have kept, ``count / (count - 1)`` times as
    large, once the start is forgotten. Of images tf.keras 2 has kept the
    unbiased variance already, by default: give no count.

    Args:
        config: of the layer; ``momentum``, ``epsilon``, ``center``, ``scale``
            and ``trainable`` are used, with Keras' defaults.
        weights: gamma where there is a scale, beta where there is a center,
            moving mean and moving variance; arrays or lists (C,).
        count: how many values of a channel a batch had in training, N·H·W.

    Returns:
        The layer, of the arrays' dtype, for inputs of any rank. Without a
        scale its weight is 1 and stays so, unless center is missing as well.
        What was frozen in Keras needs no gradient and is in evaluation mode.

    Raises:
        ValueError: another number of weights, or of another shape;
            ``renorm=True``; a count below 2.

    Chapter 4.
    """
    if config.get("renorm"):
        raise ValueError("renorm=True is another layer than batch norm")
    default = CONVENTIONS["keras"]
    names = ["gamma"] * config.get("scale", True)
    names += ["beta"] * config.get("center", True)
    names += ["moving_mean", "moving_variance"]
    if len(weights) != len(names):
        raise ValueError(
            f"expected {len(names)} weights ({', '.join(names)}), "
            f"received {len(weights)}"
        )
    layer = _batch_norm(
        config.get("epsilon", default.eps),
        config.get("momentum", default.decay),
        dict(zip(names, weights, strict=True)),
        ("gamma", "beta", "moving_mean", "moving_variance"),
        count,
    )
    if not config.get("trainable", True):
        layer.eval().requires_grad_(False)
    return layer


def to_keras_batch_norm(
    layer: Module, *, axis: int = -1, count: int | None = None
) -> tuple[dict[str, Any], list[numpy.ndarray]]:
    """Describe a batch norm in Keras' words.

    ``keras.layers.BatchNormalization(**config)``, and once that is built
    ``set_weights(weights)``.

    Args:
        layer: batch norm of normlib or of torch.nn.
        axis: where the channels are in Keras.
        count: as in :func:`from_keras_batch_norm`; the variance is divided
            by what it is multiplied by there.

    Returns:
        The config: axis, momentum, epsilon, center, scale. The weights: gamma
        and beta where there are such, moving mean, moving variance; copies
        (C,), in float32 where the layer has bfloat16.

    Raises:
        TypeError: it is no batch norm.
        ValueError: the layer has ``momentum=None``, or no running statistics;
            a count below 2.

    Chapter 4.
    """
    arrays = _arrays(layer, count)
    config = {
        "axis": axis,
        "momentum": decay_from_momentum(layer.momentum),
        "epsilon": layer.eps,
        "center": "bias" in arrays,
        "scale": "weight" in arrays,
    }
    return config, list(arrays.values())


def from_flax_batch_norm(
    fields: Mapping[str, Any],
    variables: Mapping[str, Mapping[str, Any]],
    *,
    count: int | None = None,
) -> modules.BatchNorm:
    """Make a layer of a flax.linen.BatchNorm.

    As :func:`from_keras_batch_norm`: the channels are on axis 1 here, and the
    values are taken as they are unless there is a ``count``.

    Args:
        fields: ``momentum`` and ``epsilon`` are used, with flax' defaults.
        variables: ``{"params": {"scale", "bias"}, "batch_stats": {"mean",
            "var"}}``, arrays or lists (C,); without those that
            ``use_scale=False`` and ``use_bias=False`` leave out.
        count: how many values of a channel a batch had in training, N·H·W.

    Returns:
        The layer, of the arrays' dtype, for inputs of any rank.

    Raises:
        ValueError: there is no mean or variance, there are other keys, or
            other shapes; a count below 2.

    Chapter 4.
    """
    default = CONVENTIONS["flax"]
    arrays = {
        **variables.get("params", {}),
        **variables.get("batch_stats", {}),
    }
    return _batch_norm(
        fields.get("epsilon", default.eps),
        fields.get("momentum", default.decay),
        arrays,
        ("scale", "bias", "mean", "var"),
        count,
    )


def to_flax_batch_norm(
    layer: Module, *, axis: int = -1, count: int | None = None
) -> tuple[dict[str, Any], dict[str, dict[str, numpy.ndarray]]]:
    """Describe a batch norm in flax' words.

    ``flax.linen.BatchNorm(**fields).apply(variables, x, ...)``.

    Args:
        layer: batch norm of normlib or of torch.nn.
        axis: where the channels are in flax.
        count: as in :func:`to_keras_batch_norm`.

    Returns:
        The fields: axis, momentum, epsilon, use_bias, use_scale. The
        variables, as :func:`from_flax_batch_norm` takes them; copies.

    Raises:
        TypeError: as :func:`to_keras_batch_norm`.
        ValueError: likewise.

    Chapter 4.
    """
    arrays = _arrays(layer, count)
    fields = {
        "axis": axis,
        "momentum": decay_from_momentum(layer.momentum),
        "epsilon": layer.eps,
        "use_bias": "bias" in arrays,
        "use_scale": "weight" in arrays,
    }
    names = {"weight": "scale", "bias": "bias"}
    params = {names[key]: arrays[key] for key in names if key in arrays}
    stats = {"mean": arrays["running_mean"], "var": arrays["running_var"]}
    return fields, {"params": params, "batch_stats": stats}


def _batch_norm(
    eps: float,
    decay: float,
    arrays: Mapping[str, Any],
    names: Sequence[str],
    count: int | None,
) -> modules.BatchNorm:
    """A layer of another library's arrays; names: weight, bias, mean, var."""
    weight, bias, mean, var = (_tensor(arrays.get(name)) for name in names)
    _check_arrays(arrays, names, mean, var)
    layer = modules.BatchNorm(
        len(mean),
        eps,
        momentum_from_decay(decay),
        affine=weight is not None or bias is not None,
        dtype=mean.dtype,
        bias=bias is not None,
    )
    state = {
        "weight": weight,
        "bias": bias,
        "running_mean": mean,
        "running_var": var * _bessel(count),
    }
    given = {key: value for key, value in state.items() if value is not None}
    layer.load_state_dict(given, strict=False)
    if weight is None and bias is not None:
        layer.weight.requires_grad_(False)
    return layer


def _check_arrays(arrays, names, mean, var) -> None:
    if mean is None or var is None or not set(arrays) <= set(names):
        raise ValueError(
            f"expected {names[2]} and {names[3]}, {names[0]} and {names[1]} "
            f"where there are such; received {', '.join(arrays) or 'nothing'}"
        )
    shapes = {key: numpy.shape(value) for key, value in arrays.items()}
    if set(shapes.values()) != {(mean.numel(),)}:
        raise ValueError(f"expected arrays of one shape (C,), got {shapes}")


def _arrays(layer: Module, count: int | None) -> dict[str, numpy.ndarray]:
    """What a layer holds, without what it has not, in Keras' order."""
    if not isinstance(layer, modules.BATCH_NORMS):
        raise TypeError(f"expected batch norm, received {layer}")
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError(
            f"{layer} has no running statistics, which Keras and flax need"
        )
    tensors = {
        "weight": layer.weight,
        "bias": layer.bias,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var / _bessel(count),
    }
    return {
        key: _array(tensor)
        for key, tensor in tensors.items()
        if tensor is not None
    }


def _bessel(count: int | None) -> float:
    """What makes a biased variance of so many values unbiased, or 1."""
    if count is None:
        return 1.0
    if count < 2:
        raise ValueError(
            f"count={count}: one value has no unbiased variance; expected "
            "how many values of a channel a batch had"
        )
    return count / (count - 1)


def _tensor(array) -> Tensor | None:
    if array is None:
        return None
    tensor = torch.tensor(numpy.asarray(array))
    return tensor if tensor.is_floating_point() else tensor.float()


def _array(tensor: Tensor) -> numpy.ndarray:
    narrow = tensor.dtype == torch.bfloat16  # which NumPy has not
    tensor = tensor.float() if narrow else tensor
    return tensor.detach().cpu().numpy().copy()
