"""Who computes a norm: the choice of a backend, made in one place.

A backend is a module with three functions:

``available()``
    whether it can run here at all;
``supports(x, view, weight, bias, *, over_batch, centered)``
    whether it serves this call, exactly as the eager formula would;
``normalize(x, view, weight, bias, eps, *, over_batch, centered)``
    the work: ``(y, moments)``.

:func:`pick` takes the first of :data:`BACKENDS` that serves a call. The last,
``eager``, serves every call. To add one: write the module, put it into the
table, and the tests run over it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from torch import Tensor

from normlib.axes import View
from normlib.backends import eager

BACKENDS: dict[str, ModuleType] = {"eager": eager}
"""Every backend by name, in the order of preference."""

_forced: str | None = None


def available() -> list[str]:
    """The names of the backends that can run on this machine."""
    return [name for name, module in BACKENDS.items() if module.available()]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend inside a ``with`` block, in the whole process.

    A call that the forced backend cannot serve raises; there is no silent
    fallback.

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


def pick(
    x: Tensor,
    view: View,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    over_batch: bool,
    centered: bool,
) -> ModuleType:
    """The backend that serves a call: the forced one, or the first that can.

    Raises:
        RuntimeError: a backend is forced and cannot serve this call.
    """
    names = BACKENDS if _forced is None else (_forced,)
    for name in names:
        module = BACKENDS[name]
        if module.supports(
            x, view, weight, bias, over_batch=over_batch, centered=centered
        ):
            return module
    raise RuntimeError(
        f"backend {_forced!r} is forced and does not serve shape "
        f"{tuple(x.shape)}, dtype {x.dtype}, device {x.device}"
    )
