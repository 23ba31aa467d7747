"""Fold batch norm into the layer in front of it.

In evaluation batch norm is one affine map for each channel, and so is a
convolution or a linear layer with its weight: the two together are one layer.
:func:`plan_folding` finds the pairs, by what the model does
(``normlib.calls``), and says of the others why not;
:func:`fold_batch_norm` makes the copy.
"""

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import Identity, Linear, Module, Parameter
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from normlib.backends.eager import HALF, affine
from normlib.calls import UNKNOWN, Call, Example, Seen, look, plain
from normlib.modules import BATCH_NORMS

__all__ = ["Folded", "Folding", "fold_batch_norm", "plan_folding"]


class Folding(NamedTuple):
    """Which layers of batch norm can be folded, and why the rest cannot.

    ``folded`` leads from the name of a batch norm to that of the convolution
    or linear layer that takes it in; ``left`` from its name to a reason.
    Printed, it is a report.
    """

    folded: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        total = len(self.folded) + len(self.left)
        lines = [f"{len(self.folded)} of {total} batch norms folded"]
        lines += [f"  {name} into {to}" for name, to in self.folded.items()]
        lines += [f"  {name} left: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def fold_batch_norm(model: Module, example: Example = None) -> Module:
    """Make a copy in which batch norm is part of the layer in front of it.

    A batch norm directly behind a convolution (transposed or not, 1-D to 3-D)
    or a linear layer goes into that layer's weight and bias. With
    ``s = weight / sqrt(running_var + eps)`` for each channel:
    ``w -> s * w`` and ``b -> s * (b - running_mean) + bias``, in float64 and
    then rounded to the layer's dtype. What evaluation gives is the same up to
    rounding, at the cost of the layer alone.

    The copy keeps the model's classes, names and modes. The layer gains a
    bias where it had none, and in batch norm's place stands
    :class:`Folded`. :func:`plan_folding` tells beforehand
    which layers are folded, and of each other one why it is left as it is.

    Args:
        model: in evaluation mode, any device. It is not changed, and the copy
            shares nothing with it.
        example: as in :func:`plan_folding`.

    Returns:
        The copy. Folding it again gives the same.

    Raises:
        ValueError: the model and its batch norms are in training mode.

    Jacob et al. (2018, section 3.2). Chapter 4.
    """
    plan = plan_folding(model, example)
    memo, added = {}, {}
    for name, into in plan.folded.items():
        norm, layer = model.get_submodule(name), model.get_submodule(into)
        weight, bias = _merged(layer, norm)
        # Whoever refers to one of these in the model, does so in the copy.
        memo[id(norm)] = Folded(_rank(layer)).eval()
        memo[id(layer.weight)] = weight
        if layer.bias is None:
            added[into] = bias
        else:
            memo[id(layer.bias)] = bias
    folded = copy.deepcopy(model, memo)
    for into, bias in added.items():
        folded.get_submodule(into).bias = bias
    return folded


def plan_folding(model: Module, example: Example = None) -> Folding:
    """Find the layers of batch norm that can be folded.

    A batch norm is folded where it is in evaluation mode with running
    statistics, each of its inputs is the output of one convolution or linear
    layer, and nothing else takes that output: then what is called several
    times can be folded too. Where the model decides by values, both ways are
    looked at. A part that cannot be traced is left; its children are looked
    at one by one, each taken to be called as a whole.

    Without an example two things are taken for granted: a linear layer in
    front of a batch norm has (N, C) for output, and a convolution a batch.
    :class:`Folded` checks that whenever it is called. With
    an example, a layer whose output has another shape is left, and a model
    that cannot be traced is looked at as a whole.

    Tracing takes the model to be called by its ``forward``, its arguments
    with a default all left out or all given, the others not None, and nothing
    in ``*args`` and ``**kwargs``. It does not see the other way of a model
    that asks ``isinstance(x, Tensor)`` or for a random number, counts its
    calls, or catches the error of tracing. An example adds the way it takes.

    Args:
        model: with layers of batch norm of normlib or torch.nn. A copy of it
            is traced.
        example: an input that the model is run on once, without gradients:
            a tensor, a tuple of its arguments, or a dictionary of its keyword
            arguments. Other inputs must take the same path through parts that
            cannot be traced.

    Returns:
        The plan; ``print`` shows it.

    Raises:
        ValueError: the model and its batch norms are in training mode.

    Chapter 4.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORMS)
    }
    if model.training and any(norm.training for norm in norms.values()):
        raise ValueError(
            "folding takes the running statistics of evaluation, and "
            f"{type(model).__name__} is in training mode: call eval() first"
        )
    modules = dict(model.named_modules())
    seen = look(model, example) if norms else None
    plan = Folding({}, {})
    for name in norms:
        try:
            plan.folded[name] = _partner(name, modules, seen)
        except _LeftError as reason:
            plan.left[name] = str(reason)
    return plan


class Folded(Identity):
    """What stands in the place of a batch norm that was folded.

    It hands on its input. Folding holds for inputs of one rank, (N, C) behind
    a linear layer: others are refused, as batch norm would read another axis
    as its channels.

    Args:
        rank: the number of axes.

    Raises:
        ValueError: in ``forward``, an input of another rank.

    Chapter 4.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, input: Tensor) -> Tensor:
        """The input itself."""
        return _checked(input, self.rank)

    def extra_repr(self) -> str:
        """The constructor's argument."""
        return f"rank={self.rank}"


@fx.wrap
def _checked(input: Tensor, rank: int) -> Tensor:
    if input.dim() != rank:
        raise ValueError(
            f"expected {rank}D input (got {input.dim()}D input): batch norm "
            "was folded for this rank only; give fold_batch_norm an example, "
            "and it is left where it has another"
        )
    return input


# The arithmetic


def _merged(layer: Module, norm: Module) -> tuple[Parameter, Parameter]:
    """Weight and bias of one layer that does what the two do in turn.

    Batch norm is affine: all of it goes over the bias, and what is linear of
    it over the weight.
    """
    w, b, mean, var, scale, shift = (
        None if p is None else p.detach().double()
        for p in (
            *(layer.weight, layer.bias, norm.running_mean, norm.running_var),
            *(norm.weight, norm.bias),
        )
    )
    zero = torch.zeros_like(mean)
    slope = affine(zero + 1, None, var, scale, None, norm.eps)
    b = affine(zero if b is None else b, mean, var, scale, shift, norm.eps)
    w = w * _beside_outputs(slope, layer)
    trained = _trained(layer.bias, norm.bias, layer.weight)
    return (
        Parameter(w.to(layer.weight.dtype), layer.weight.requires_grad),
        Parameter(b.to(layer.weight.dtype), trained),
    )


def _beside_outputs(slope: Tensor, layer: Module) -> Tensor:
    """One value for each output, beside the layer's weight.

    (C, C_in / groups, ...), or (C_in, C / groups, ...) where transposed:
    there each group of inputs has outputs of its own.
    """
    rest = (1,) * (layer.weight.dim() - 2)
    if not isinstance(layer, _ConvTransposeNd):
        return slope.reshape(-1, 1, *rest)
    inputs = layer.weight.shape[0] // layer.groups
    groups = slope.reshape(layer.groups, -1)
    return groups.repeat_interleave(inputs, 0).reshape(
        *layer.weight.shape[:2], *rest
    )


def _trained(*parameters: Parameter | None) -> bool:
    """Whether the first of them that is there takes a gradient."""
    return next(p.requires_grad for p in parameters if p is not None)


def _rank(layer: Module) -> int:
    """The number of axes of the layer's output, of a batch."""
    return layer.weight.dim()


# The judgement


class _LeftError(Exception):
    """The reason for leaving a batch norm."""


def _partner(name: str, modules: Mapping[str, Module], seen: Seen) -> str:
    """The name of the layer that a batch norm goes into.

    Raises:
        _LeftError: there is none.
    """
    norm = modules[name]
    if reason := _untracked(norm) or _odd(norm) or _unseen(name, seen):
        raise _LeftError(f"it {reason}")
    calls = [call for call in seen.calls if call.layer == name]
    into = _only_source(calls, modules)
    for call in seen.calls:
        for user in call.users if call.layer == into else ():
            if not isinstance(user, Call) or user.layer != name:
                also = _said(user, modules)
                raise _LeftError(f"the output of {into!r} also goes to {also}")
    layer = modules[into]
    reason = (
        _odd(layer)
        or _unseen(into, seen)
        or _shared(into, modules)
        or _unlike(layer, norm, {call.rank for call in calls})
    )
    if reason:
        raise _LeftError(f"{into!r} {reason}")
    return into


def _only_source(calls: list[Call], modules: Mapping[str, Module]) -> str:
    layers = {c.source.layer for c in calls if isinstance(c.source, Call)}
    others = {c.source for c in calls if not isinstance(c.source, Call)}
    if len(layers) == 1 and not others:
        (into,) = layers
        if isinstance(modules[into], (_ConvNd, Linear)):
            return into
    said = {_said(call.source, modules) for call in calls}
    known = sorted(said - {UNKNOWN}) or [UNKNOWN]
    raise _LeftError(f"its input comes from {' and from '.join(known)}")


def _said(who: Call | str, modules: Mapping[str, Module]) -> str:
    """Name a layer and its class; what is no layer is in words already."""
    if isinstance(who, Call):
        return f"{who.layer!r} ({type(modules[who.layer]).__name__})"
    return who


def _untracked(norm: Module) -> str | None:
    if norm.training:
        return "is in training mode"
    if norm.running_mean is None or norm.running_var is None:
        return "has no running statistics"
    return None


def _odd(module: Module) -> str | None:
    """What makes a module another than torch.nn's or normlib's."""
    tensors = (*module.parameters(), *module.buffers())
    if any(is_lazy(t) or t.is_meta for t in tensors):
        return "has no values yet"
    if is_parametrized(module):
        return "is parametrized"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "has hooks"
    if set(module._parameters) != {"weight", "bias"}:
        return "has other parameters than weight and bias"
    if not plain(module):
        return f"has a forward of its own ({type(module).__name__})"
    return None


_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks"),
    *("_backward_hooks", "_backward_pre_hooks"),
)


def _unseen(name: str, seen: Seen) -> str | None:
    if name in seen.hidden:
        return f"may be called by {seen.hidden[name]}"
    if name in seen.read:
        return "has tensors that are used outside of it"
    if all(call.layer != name for call in seen.calls):
        return "is called nowhere that was looked at"
    return None


def _shared(name: str, modules: Mapping[str, Module]) -> str | None:
    mine = {id(p) for p in modules[name].parameters()}
    for other, module in modules.items():
        theirs = {id(p) for p in module.parameters(recurse=False)}
        if other != name and mine & theirs:
            return f"shares parameters with {other!r}"
    return None


def _unlike(layer: Module, norm: Module, ranks: set[int | None]) -> str | None:
    """Why the layer's output is not what batch norm takes for (N, C, ...)."""
    weight, var = layer.weight, norm.running_var
    if wrong := ranks - {None, _rank(layer)}:
        return f"has an output of {max(wrong)} axes, not {_rank(layer)}"
    try:
        norm._check_input_dim(torch.empty((1,) * _rank(layer)))
    except ValueError as error:
        return f"has an output that is refused: {error}"
    channels = getattr(layer, "out_channels", len(weight))
    if channels != len(var):
        return f"has {channels} channels, not {len(var)}"
    if weight.device != var.device:
        return f"is on {weight.device}, not on {var.device}"
    mixed = weight.dtype in HALF and var.dtype == torch.float32
    if weight.dtype != var.dtype and not mixed:
        return f"is of {weight.dtype}, not of {var.dtype}"
    if not all(p.isfinite().all() for p in _merged(layer, norm)):
        return f"would get weights that {weight.dtype} cannot hold"
    return None
