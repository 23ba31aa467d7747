"""Who computes a norm: the choice of a backend, made in one place.

A backend is a module with five functions:

``available()``
    whether it can run here at all;
``supports(x, view, weight, bias, *, over_batch, centered)``
    whether it can serve this call;
``least(norm, x, weight)``
    how many values a call must have for the next question to be asked;
``pays(x, view, weight, bias, *, over_batch, centered)``
    whether it is the best that there is for this call, by measurement;
``normalize(x, view, weight, bias, eps, *, over_batch, centered, moments)``
    the work: ``(y, moments)``, where the moments may be None unless asked
    for.

It may have two more:

``evaluate(x, view, mean, var, weight, bias, eps)``
    the same by given statistics, one for each group;
``fuse(x, view, weight, bias, eps, extras, *, over_batch, centered, moments)``
    the norm together with its neighbors, as ``fused.Extras`` says:
    ``(y, total, moments)``. Its ``supports`` and ``pays`` then take
    ``extras`` too.

:func:`pick` takes the first of :data:`BACKENDS` that pays. Where none does,
torch's own kernel is the best, and it is called with the caller's own
arguments: so it is for small tensors, and wherever something other than a
plain call is going on (tracing, transforms, autocast, tensor subclasses).
The last backend, ``eager``, is the formula itself. It serves every call,
never pays, and is what the others are measured against. To add a backend:
write the module, put it into the table, and the tests run over it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from normlib.axes import View
from normlib.backends import cpu, eager, fused, triton

BACKENDS: dict[str, ModuleType] = {
    "triton": triton,
    "cpu": cpu,
    "eager": eager,
}
"""Every backend by name, in the order of preference."""

LEAST = 2**18
"""With fewer values than this a call is left to torch. Nothing is faster
there, and already asking would take longer than it could save."""

_forced: str | None = None


def available() -> list[str]:
    """The names of the backends that can run on this machine."""
    return [name for name, module in BACKENDS.items() if module.available()]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend inside a ``with`` block, in the whole process.

    A call that the forced backend cannot serve raises; there is no silent
    fallback. ``use_backend("eager")`` makes every norm the formula itself.

    Args:
        name: one of :func:`available`.

    Raises:
        ValueError: no such backend, or it cannot run here.
    """
    global _forced
    if name not in available():
        raise ValueError(
            f"backend {name!r} is not available; there are: {available()}"
        )
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def considers(
    x: Tensor,
    norm: str,
    weight: Tensor | None,
    *others: Tensor | None,
    needed: str = "normalize",
) -> bool:
    """Whether a backend of ours may serve a call at all.

    This is asked first and of every call, so it is cheap (half a
    microsecond where the call is small), and its order matters: a compiler
    must not see the questions that would break its trace.

    Args:
        x: the input.
        norm: a row of :data:`normlib.axes.TABLE`, ``"evaluation"``, or
            ``"normalize"`` for a view that may be any of them.
        weight: the scale, or None.
        others: what else must be an ordinary tensor, or None.
        needed: the function that a backend must have for it.
    """
    if _forced is not None:
        return hasattr(BACKENDS[_forced], needed)
    if torch.compiler.is_compiling() or type(x) not in fused.TENSORS:
        return False
    if torch.jit.is_tracing() or (size := x.numel()) < LEAST:
        return False
    for module in BACKENDS.values():
        if hasattr(module, needed) and size >= module.least(norm, x, weight):
            return fused.plain(x, weight, *others)
    return False


def pick(
    x: Tensor,
    view: View,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    over_batch: bool,
    centered: bool,
    given: object = None,
    extras: fused.Extras | None = None,
) -> ModuleType | None:
    """The backend for a call that :func:`considers` let through.

    Args:
        x: the input, with the next three as for the backend.
        view: see there.
        weight: see there.
        bias: see there.
        over_batch: see there.
        centered: see there.
        given: statistics from outside; these need ``evaluate``.
        extras: what to fuse with the norm; this needs ``fuse``.

    Returns:
        The forced backend, or the first that pays, or None: torch's own
        kernel is the best, or none fuses this.

    Raises:
        RuntimeError: a backend is forced and cannot serve this call. Where it
            does not fuse it, the norm is asked for alone.
    """
    call = (x, view, weight, bias)
    kind = {"over_batch": over_batch, "centered": centered}
    needed = "normalize" if given is None else "evaluate"
    if extras is not None:
        needed, kind["extras"] = "fuse", extras
    names = BACKENDS if _forced is None else (_forced,)
    for name in names:
        module = BACKENDS[name]
        if (
            hasattr(module, needed)
            and (_forced is not None or module.pays(*call, **kind))
            and module.supports(*call, **kind)
        ):
            return module
    if _forced is None or extras is not None:
        return None
    raise RuntimeError(
        f"backend {_forced!r} is forced and does not serve "
        f"{'given statistics, ' if given is not None else ''}"
        f"shape {tuple(x.shape)}, dtype {x.dtype}, device {x.device}"
    )
