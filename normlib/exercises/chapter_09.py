"""Checks of chapter 9: rounding, and what it does to a norm."""

import itertools
import math

import numpy
import torch

from normlib.exercises import exercise
from normlib.exercises.compare import array, has_keys, unpacked

_BITS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}
"""Binary digits, the leading one included."""


@exercise(
    "ch9-one-pass",
    "You may not look back, but you may subtract a constant from all that "
    "comes: no variance changes. Which number near the mean do you have "
    "before anything else?",
    "Or keep (count, mean, var) of what is past, take the moments of each "
    "block in two passes while you hold it, and merge: chapter 4.",
)
def one_pass(answer) -> None:
    """``moments(blocks)``: mean and variance of float32 values, seen once."""
    for offset, sizes in ((0, (64,)), (1e4, (1, 500, 37)), (3e5, (256,) * 8)):
        rng = numpy.random.default_rng(0)
        x = rng.normal(offset, 1.0, sum(sizes)).astype(numpy.float32)
        cuts = numpy.cumsum(sizes)[:-1]
        got = unpacked(answer(_stream(numpy.split(x, cuts))), "mean", "var")
        mean, var = (float(array(value, ())) for value in got)
        exact = x.astype(numpy.float64)
        where = f"mean {offset:g}, {len(sizes)} blocks"
        assert math.isfinite(var), f"the variance is {var} ({where})"
        far = abs(var / exact.var() - 1)
        assert far < 1e-2, (
            f"the variance is {exact.var():.4f}, got {var:.4g} ({where})"
        )
        off = abs(mean - exact.mean())
        assert off < 0.05, (
            f"the mean is {exact.mean():.4f}, got {mean:.10g} ({where})"
        )
        wide = offset == 0 and min(far, off) < 1e-12
        assert not wide, "right to twelve digits: float32 has seven"


def _stream(blocks):
    """One block after the other; the one before is gone then."""
    for block in blocks:
        given = _Block32(block)
        yield given
        given[:] = numpy.nan


class _Block32(numpy.ndarray):
    """float32 values that do not let themselves be made float64."""

    def __new__(cls, values):
        return numpy.array(values, numpy.float32).view(cls)

    def astype(self, dtype, *args, **kwargs):
        assert numpy.dtype(dtype).itemsize <= 4, "float32 is all there is"
        return super().astype(dtype, *args, **kwargs)


@exercise(
    "ch9-offset",
    "The law: relative error of the variance = u (mu / sigma)^2. Set it to "
    "the root of u. What is u, half the spacing at 1, in each format?",
    "p binary digits, the leading one included, have u = 2^-p. p is 24 for "
    "float32, 53 for float64, 11 for float16, 8 for bfloat16.",
)
def offset(answer) -> None:
    """``{dtype name: mu / sigma}`` where one pass has half of its digits."""
    has_keys(answer, _BITS)
    found = {}
    for name, value in answer.items():
        assert value is not None, f"{name} is still open"
        found[name] = float(array(value, ()))
        assert found[name] > 0, f"{name}: {value} is no ratio above 0"
    wrong = {
        name: value
        for name, value in found.items()
        if abs(math.log2(value) - _BITS[name] / 4) > math.log2(1.5)
    }
    said = "; ".join(
        f"{name}: at {value:.3g} the law says an error of "
        f"{value**2 * 2.0 ** -_BITS[name]:.2g}, and the root of u is "
        f"{2.0 ** (-_BITS[name] / 2):.2g}"
        for name, value in wrong.items()
    )
    assert not wrong, f"not within a factor of 1.5: {said}"


@exercise(
    "ch9-merge",
    "The mean of all is the mean of the parts' means, weighted by their "
    "counts. The variance is what lies within the parts and what lies "
    "between them: chapter 4.",
    "Shift all means by the first one before you square anything, and give "
    "an empty part no say: its mean may be anything, even NaN.",
)
def merge(answer) -> None:
    """``merge(count, mean, m2)``: float32 partial results to (mean, var)."""
    for offset, empty in ((0.0, ()), (1e4, ()), (1e4, (2, 4))):
        rng = numpy.random.default_rng(1)
        sizes = [7, 64, 33, 1, 20]
        parts = [rng.normal(offset, 2.0, n) for n in sizes]
        for k in empty:
            parts[k] = parts[k][:0]
        count = numpy.array([len(p) for p in parts], numpy.float32)
        mean, m2 = numpy.full((2, 5), numpy.nan)
        for k, part in enumerate(parts):
            if len(part):
                mean[k], m2[k] = part.mean(), len(part) * part.var()
        mean, m2 = mean.astype(numpy.float32), m2.astype(numpy.float32)
        m2[count == 0] = 0.0
        exact = numpy.concatenate(parts)
        got = answer(count.copy(), mean.copy(), m2.copy())
        got = unpacked(got, "mean", "var")
        found = [float(array(value, ())) for value in got]
        where = f"mean {offset:g}, {len(empty)} empty parts"
        assert all(map(math.isfinite, found)), f"got {found} ({where})"
        for what, value, right in zip(
            ("mean", "variance"),
            found,
            (exact.mean(), exact.var()),
            strict=True,
        ):
            assert abs(value - right) < 1e-2, (
                f"the {what} is {right:.4f}, got {value:.7g} ({where})"
            )


@exercise(
    "ch9-stall",
    "What a step wants to add is less than half the spacing at the running "
    "mean, and rounding throws it away. It need not: keep what was thrown "
    "away, in the second tensor, and offer it again.",
    "wanted = running + (momentum * (new - running) + rest) in float32; the "
    "new running is wanted in bfloat16; the new rest is what is missing.",
)
def stall(answer) -> None:
    """``update(running, rest, new, momentum)`` of bfloat16 tensors."""
    for momentum, target in ((0.01, 1.0), (0.1, -3.0), (0.003, 50.0)):
        new = torch.full((2,), target)
        running = rest = torch.zeros(2, dtype=torch.bfloat16)
        halfway = math.ceil(0.7 / momentum)
        for step in range(1, math.ceil(8 / momentum) + 1):
            got = answer(running, rest, new, momentum)
            running, rest = unpacked(got, "running", "rest")
            for name, t in (("running", running), ("rest", rest)):
                kept = isinstance(t, torch.Tensor) and (
                    t.dtype == torch.bfloat16
                )
                assert kept, f"{name} must be kept in bfloat16"
            if step == halfway:
                wanted = target * (1 - (1 - momentum) ** step)
                found = running.double().mean().item()
                assert abs(found / wanted - 1) < 0.03, (
                    f"with momentum {momentum} it should have come to "
                    f"{wanted:.3g} after {step} batches of mean "
                    f"{target:g}, and is at {found:.3g}"
                )
        found = running.double().mean().item()
        assert abs(found / target - 1) < 0.01, (
            f"with momentum {momentum} and batches of mean {target:g} it "
            f"came to {found:g}"
        )


@exercise(
    "ch9-order",
    "The spacing of float32 at 2^24 is 2, and a sum that lies halfway goes "
    "to the even neighbor: 2^24 + 1 is 2^24 again.",
    "Below 2^24 the spacing is 1: 1 - 2^24 is exact. What matters is how "
    "many of the ones are added while +2^24 stands there alone.",
)
def order(answer) -> None:
    """All results of adding (2^24, 1, 1, -2^24) in float32, one by one."""
    several = hasattr(answer, "__iter__") and not isinstance(answer, str)
    assert several, f"expected a set, got {answer!r}"
    found = {float(array(value, ())) for value in answer}
    values = [numpy.float32(v) for v in (2.0**24, 1, 1, -(2.0**24))]
    right = set()
    for a, b, c, d in itertools.permutations(values):
        right.add(float(((a + b) + c) + d))
    missing, extra = right - found, found - right
    assert not extra, f"{min(extra):g} does not come out in any order"
    assert not missing, f"{len(missing)} more can come out"
