"""Comparisons whose messages show the values, for the checks."""

import numpy
import torch


def array(value, shape: tuple[int, ...] | None) -> numpy.ndarray:
    """Make an answer a float64 array; assert its shape where one is given."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
    found = numpy.asarray(value, dtype=numpy.float64)
    fits = shape is None or found.shape == shape
    assert fits, f"expected the shape {shape}, got {found.shape}"
    return found


def unpacked(answer, *names: str) -> tuple | list:
    """The answer itself; assert that it is a tuple or list of so many."""
    fits = isinstance(answer, (tuple, list)) and len(answer) == len(names)
    assert fits, f"expected the tuple ({', '.join(names)})"
    return answer


def has_keys(answer, keys) -> None:
    """Assert that an answer is a dict with these keys."""
    assert isinstance(answer, dict), f"expected a dict, got {answer!r}"
    assert set(answer) == set(keys), (
        f"expected the keys {tuple(keys)}, got {tuple(answer)}"
    )


def says(what: str, got, wanted, where: str) -> None:
    """Assert that two arrays agree, or name the entry that is most wrong."""
    got, wanted = (array(value, None) for value in (got, wanted))
    assert numpy.isfinite(got).all(), f"{what}: NaN or infinity ({where})"
    gap = numpy.abs(got - wanted)
    tolerance = 1e-5 * max(1.0, numpy.abs(wanted).max())
    if not (gap <= tolerance).all():
        worst = numpy.unravel_index(numpy.argmax(gap), gap.shape)
        near = gap.max() < 1e-2 * max(1.0, numpy.abs(wanted).max())
        digits = 7 if near else 4
        raise AssertionError(
            f"{what}: expected {wanted[worst]:.{digits}g}, "
            f"got {got[worst]:.{digits}g} ({where})"
        )
