"""Comparisons that leave a trace: one tolerance table, one list of results.

The chapters compare the reader's code, this package and torch.nn with
:func:`agree`, on every device of :func:`devices`. What was compared, where,
and by how much it differed is kept in :data:`comparisons`, from which
``python -m benchmarks.chapters`` writes its record.
"""

import inspect
import math
from typing import NamedTuple

import numpy
import torch

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
"""Largest difference allowed by dtype, as a share of the largest expected
magnitude (or of 1, where that is larger). float32 leaves room for sums taken
in another order over some 10,000 values; the 16-bit types for one rounding of
the result on top of it."""


class Comparison(NamedTuple):
    """One comparison that held: what, where, and by how much it differed."""

    name: str
    device: str
    dtype: str
    difference: float
    tolerance: float


comparisons: list[Comparison] = []
"""Every comparison made by :func:`agree` in this process, in order."""

_devices: list[str] | None = None


def use_devices(*names: str) -> None:
    """Restrict :func:`devices` to the given ones; with no name, undo it."""
    global _devices
    _devices = [str(torch.device(name)) for name in names] or None


def devices() -> list[str]:
    """The devices on which comparisons run: the CPU, and CUDA if present."""
    if _devices is not None:
        return list(_devices)
    return ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def assert_close(
    actual, expected, *, tolerance: float | None = None, floor: float = 1.0
) -> float:
    """Assert that two tensors, arrays or (nested) sequences are the same.

    Args:
        actual: tensor, array, number, or a sequence of these.
        expected: the same structure. Shapes must match exactly, dtypes need
            not. NaN equals NaN, and an infinity equals the same infinity.
        tolerance: share of the largest expected magnitude; by default
            :data:`TOLERANCE` of the coarser of the two dtypes.
        floor: the least magnitude that counts. With 1, the default, values
            far below 1 are compared absolutely; with 0 they are not, and
            rounding noise does not equal zero.

    Returns:
        The largest difference, as a share of that magnitude.

    Raises:
        AssertionError: with the shapes, or the largest difference and the
            tolerance.
    """
    gaps = _gaps(actual, expected, tolerance, floor)
    for gap in gaps:
        assert gap.difference <= gap.tolerance, (
            f"largest difference {gap.difference:.3g} exceeds "
            f"{gap.tolerance:.3g} (shape {tuple(gap.actual.shape)}, "
            f"{gap.actual.dtype})"
        )
    return max((gap.difference for gap in gaps), default=0.0)


def agree(name: str, ours, theirs, *, tolerance: float | None = None) -> None:
    """:func:`assert_close`, and a line in :data:`comparisons`.

    Args:
        name: what is compared, such as ``"BatchNorm2d backward"``.
        ours: tensor, array, number, or a sequence of these.
        theirs: the same structure.
        tolerance: as in :func:`assert_close`.

    Raises:
        AssertionError: where they differ, with the name.
        ValueError: where there is nothing to compare.
    """
    try:
        assert_close(ours, theirs, tolerance=tolerance)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None
    gaps = _gaps(ours, theirs, tolerance, 1.0)
    if not gaps:
        raise ValueError(f"{name}: nothing to compare")
    worst = max(gaps, key=lambda gap: gap.difference / (gap.tolerance or 1.0))
    comparisons.append(
        Comparison(
            name,
            worst.actual.device.type,
            str(worst.actual.dtype).removeprefix("torch."),
            worst.difference,
            worst.tolerance,
        )
    )


def show_source(obj) -> None:
    """Print the source of a function or class, as it stands in the package.

    A chapter that shows a piece of the package shows the piece itself: an
    edit of the package changes the chapter's output, and nbval notices.
    """
    print(inspect.getsource(obj).rstrip())


class _Gap(NamedTuple):
    actual: torch.Tensor
    difference: float
    tolerance: float


def _gaps(actual, expected, tolerance, floor) -> list[_Gap]:
    if isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected), (len(actual), len(expected))
        pairs = zip(actual, expected, strict=True)
        found = [_gaps(a, e, tolerance, floor) for a, e in pairs]
        return [gap for gaps in found for gap in gaps]
    a, e = _tensor(actual), _tensor(expected)
    assert a.shape == e.shape, f"shapes {tuple(a.shape)}, {tuple(e.shape)}"
    if tolerance is None:
        tolerance = max(TOLERANCE.get(x.dtype, 0.0) for x in (a, e))
    difference = _difference(a.double().cpu(), e.double().cpu(), floor)
    return [_Gap(a, difference, tolerance)]


def _tensor(value) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        value = torch.from_numpy(numpy.array(value))
    assert not value.is_complex(), "complex values are not compared"
    return value.detach()


def _difference(a: torch.Tensor, e: torch.Tensor, floor: float) -> float:
    same = (a == e) | (a.isnan() & e.isnan())
    if same.all():
        return 0.0
    gap = (a - e).abs().masked_fill(same, 0.0)
    finite = e[e.isfinite()].abs()
    scale = max(floor, finite.max().item() if finite.numel() else floor)
    largest = gap.max().item() / scale if scale else math.inf
    return math.inf if math.isnan(largest) else largest
