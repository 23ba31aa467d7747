"""A pair of kernels, forward and backward, as one step of autograd.

A fast kernel reads its tensors where autograd does not look, so it needs a
backward of its own, and must not be reached by anything that follows
operations one by one. :func:`plain` recognizes the ordinary call;
everything else goes to torch's own kernel or to the formula. A second
derivative, or a backward in unusual company, is taken from the formula too:
:func:`normlib.backends.eager.backward`, which differentiates to any order.

The kernels are a module with two functions, which run without autograd:

``forward(x, view, weight, bias, eps, *, over_batch, centered)``
    ``y, mean, var, kept``. y has the shape, dtype and memory format of x;
    mean and biased var have shape (N, G), or (G,) where ``over_batch``, or
    are None; kept is a tuple of whatever tensors the backward reads.
``backward(dy, x, view, weight, kept, needs, *, over_batch, centered)``
    ``dx, dweight, dbias``, of which ``needs`` says by three booleans which
    are wanted; the others are None. dy has the shape of x and any strides;
    the weight is None also where none of what is wanted needs it.

Where something is fused with the norm, both are also given ``extras``. With a
residual, the forward normalizes x + residual, and the backward's x is the sum.
"""

import functools
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from normlib.axes import View
from normlib.backends import eager
from normlib.stats import Moments

TENSORS = (Tensor, torch.nn.Parameter)
"""The types of a plain tensor; a subclass may mean anything."""


class Extras(NamedTuple):
    """What kernels do on the way, besides the norm."""

    activation: str | None = None
    """Of what the norm gives: a name in
    :data:`normlib.backends.eager.ACTIVATIONS`."""
    residual: Tensor | None = None
    """Added to x before the norm: of its shape and dtype, any strides."""
    total: Tensor | None = None
    """Where the forward leaves x + residual."""
    dtotal: Tensor | None = None
    """In the backward, what is added to dx, the gradient of that sum from
    elsewhere; likewise."""
    bias: Tensor | None = None
    """In the backward, the shift, without which an activation's slope is not
    known."""


def plain(*tensors: Tensor | None) -> bool:
    """Whether a call with these tensors is an ordinary one, on one device.

    False under a compiler or a tracer, inside ``torch.func`` transforms,
    forward-mode differentiation, ``__torch_function__`` and
    ``__torch_dispatch__`` modes, and autocast; for subclasses, and for
    tensors that are sparse, quantized, fake, lazily conjugated, or neither on
    the CPU nor on CUDA. The private names are those that torch's own Python
    uses; where one is missing nothing is plain.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    given = [t for t in tensors if t is not None]
    if _QUESTIONS is None or not all(type(t) in TENSORS for t in given):
        return False
    overridden, transformed, modes, keys = _QUESTIONS
    if (
        overridden(*given)
        or transformed()
        or modes()
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    device = given[0].device.type if given else "cpu"
    if device not in ("cpu", "cuda") or torch.is_autocast_enabled(device):
        return False
    # Inference tensors have no place in a graph.
    allowed = _ordinary_keys(device)[: 1 if torch.is_grad_enabled() else 2]
    return all(keys(t).raw_repr() in allowed for t in given)


def layout(x: Tensor) -> torch.memory_format | None:
    """How a dense x lies in memory: contiguous, channels last, or neither."""
    if x.is_contiguous():
        return torch.contiguous_format
    last = _LAST.get(x.dim())
    # Not is_contiguous(memory_format=last), which vmap does not know.
    dense = last is not None and x.movedim(1, -1).is_contiguous()
    return last if dense else None


def normalize(
    kernels: ModuleType,
    x: Tensor,
    view: View,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    over_batch: bool,
    centered: bool,
    moments: bool,
) -> tuple[Tensor, Moments | None]:
    """The work of a backend, given its kernels.

    Args:
        kernels: see above.
        x: plain, as are weight and bias.
        view: how to see it as (N, G, K, M).
        weight: scale, or None.
        bias: shift, or None.
        eps: added to the variance.
        over_batch: whether the statistics run over the instances too.
        centered: whether the mean is subtracted.
        moments: whether the moments are wanted; they carry their gradient.

    Returns:
        As :func:`normlib.backends.eager.normalize`, the moments None where
        they are not wanted.
    """
    y, _, found = fuse(
        *(kernels, x, view, weight, bias, eps, Extras()),
        over_batch=over_batch,
        centered=centered,
        moments=moments,
    )
    return y, found


def fuse(
    kernels: ModuleType,
    x: Tensor,
    view: View,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    extras: Extras,
    *,
    over_batch: bool,
    centered: bool,
    moments: bool = False,
) -> tuple[Tensor, Tensor | None, Moments | None]:
    """The same with more in the same kernels.

    ``y = activation(norm(x + residual))``, without an activation or a
    residual where it is None.

    Args:
        kernels: as for :func:`normalize`, as are the next five.
        x: see there.
        view: see there.
        weight: see there.
        bias: see there.
        eps: see there.
        extras: the activation and the residual, which is plain.
        over_batch: see there.
        centered: see there.
        moments: see there.

    Returns:
        y; x + residual in the dtype of x, or None without a residual; the
        moments, or None.
    """
    residual = extras.residual
    kind = {"over_batch": over_batch, "centered": centered}
    call = _Call(kernels, view, eps, extras.activation, kind)
    needs_graph = torch.is_grad_enabled() and any(
        p is not None and p.requires_grad for p in (x, residual, weight, bias)
    )
    if needs_graph:
        y, total, mean, var = _Fused.apply(x, residual, weight, bias, call)
    else:
        with torch.no_grad():
            y, total, mean, var, _ = _forward(x, residual, weight, bias, call)
    if not moments:
        return y, total, None
    if var is None or not centered:
        x = x if total is None else total
        return y, total, eager.moments(x, view, **kind)
    shape = (1 if over_batch else view.N, view.G, 1, 1)
    count = view.count(over_batch)
    found = Moments(count, mean.reshape(shape), var.reshape(shape))
    return y, total, found


def flat(p: Tensor | None) -> Tensor | None:
    """A weight or bias as kernels read it: one value after the other."""
    if p is None or (p.dim() == 1 and p.is_contiguous()):
        return p
    return p.reshape(-1).contiguous()


class _Call(NamedTuple):
    """What the kernels are told besides tensors."""

    kernels: ModuleType
    view: View
    eps: float
    activation: str | None
    kind: dict[str, bool]


def _forward(x, residual, weight, bias, call):
    """The kernels' forward: y, x + residual, mean, var, kept."""
    kernels, view, eps, activation, kind = call
    total = None if residual is None else torch.empty_like(x)
    if activation is not None or residual is not None:
        kind = {**kind, "extras": Extras(activation, residual, total)}
    y, *rest = kernels.forward(x, view, weight, bias, eps, **kind)
    return y, total, *rest


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, call):
        y, total, mean, var, kept = _forward(x, residual, weight, bias, call)
        # The weight is of no use to its own gradient; saved all the same,
        # it could not be changed in place before the backward.
        slope = call.activation is not None  # for which they both count
        scale = weight if slope or any(ctx.needs_input_grad[:2]) else None
        shift = bias if slope else None
        x = x if total is None else total
        ctx.save_for_backward(x, scale, shift, *kept)
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.parameters = tuple(
            None if p is None else (p.shape, p.dtype) for p in (weight, bias)
        )
        return y, total, mean, var

    @staticmethod
    def backward(ctx, dy, dtotal, dmean, dvar):
        if dy is dmean is dvar is None:  # the sum alone was used
            return dtotal, dtotal, None, None, None
        # The order matters: with a graph being made, the saved statistics
        # are constants and would give wrong second derivatives.
        x, weight, bias, *kept = (
            None if t is None else eager.settle(t)  # hooks may lay them out
            for t in ctx.saved_tensors
        )
        kernels, view, eps, activation, kind = ctx.call
        of_x, of_residual, *others = ctx.needs_input_grad[:4]
        needs = (of_x or of_residual, *others)
        if (
            torch.is_grad_enabled()
            or dy is None
            or dmean is not None
            or dvar is not None
            or not plain(dy, dtotal, x, weight, bias)
        ):
            dx, *rest = eager.backward(
                *(dy, x, view, weight, eps, needs, dmean, dvar),
                **(kind | {"bias": bias, "activation": activation}),
            )
            if dx is not None and dtotal is not None:
                dx = dx + dtotal
        else:
            if activation is not None or dtotal is not None:
                extras = Extras(activation, dtotal=dtotal, bias=bias)
                kind = {**kind, "extras": extras}
            dx, *rest = kernels.backward(
                dy, x, view, weight, tuple(kept), needs, **kind
            )
        gradients = [
            g
            if g is None or (g.shape, g.dtype) == like
            else g.reshape(like[0]).to(like[1])
            for g, like in zip(rest, ctx.parameters, strict=True)
        ]
        return dx, dx if of_residual else None, *gradients, None


def _lookup():
    """Find the private questions about a call; all of them, or none."""
    found = [
        getattr(torch.overrides, "has_torch_function_variadic", None),
        getattr(torch._C, "_are_functorch_transforms_active", None),
        getattr(torch._C, "_len_torch_dispatch_stack", None),
        getattr(torch._C, "_dispatch_keys", None),
    ]
    level = hasattr(torch.autograd.forward_ad, "_current_level")
    return found if all(found) and level else None


@functools.cache
def _ordinary_keys(device: str) -> tuple[int, int]:
    """The dispatch keys of a plain tensor, and of an inference tensor."""
    with torch.inference_mode(False):
        ordinary = torch._C._dispatch_keys(torch.empty(0, device=device))
    with torch.inference_mode():
        inference = torch._C._dispatch_keys(torch.empty(0, device=device))
    return ordinary.raw_repr(), inference.raw_repr()


_QUESTIONS = _lookup()
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
