"""Checks of chapter 5: batch, layer, instance and group normalization."""

import numpy

from normlib import reference
from normlib.exercises import exercise
from normlib.exercises.compare import array, has_keys, says, unpacked

_KINDS = ("batch", "layer", "instance", "group", "rms")


@exercise(
    "ch5-axes",
    "See x as (N, groups, rest). How many groups has each of the norms, and "
    "for which of them does the average also run over N?",
    "RMS norm divides by the root of the mean of the squares; the others "
    "first subtract the mean, and then do the same.",
)
def axes(answer) -> None:
    """``norm(x, kind, groups)``: five norms of (N, C, H, W)."""
    rng = numpy.random.default_rng(0)
    for shape, groups in (((4, 6, 3, 2), 3), ((2, 4, 1, 5), 2)):
        scale = numpy.arange(1.0, shape[1] + 1).reshape(-1, 1, 1)
        x = rng.normal(2 * scale, scale, size=shape)
        for kind in _KINDS:
            given = x.copy()
            got = array(answer(given, kind, groups), shape)
            assert (given == x).all(), f"it changed its input ({kind})"
            wanted = _norm(x, kind, groups)
            says("output", got, wanted, f"{kind}, shape {shape}")


def _norm(x, kind: str, groups: int):
    shape = x.shape[1:]
    return {
        "batch": lambda: reference.batch_norm(x),
        "layer": lambda: reference.layer_norm(x, shape),
        "instance": lambda: reference.instance_norm(x),
        "group": lambda: reference.group_norm(x, groups),
        "rms": lambda: reference.rms_norm(x, shape),
    }[kind]()[0]


@exercise(
    "ch5-masked",
    "x[mask] has the shape (tokens, D): only the real tokens, one below the "
    "other.",
    "Take mean and variance of each column of that table, and normalize the "
    "table. Then the rows must go back to where the mask is true.",
)
def masked(answer) -> None:
    """Batch norm of (N, T, D) over the tokens whose mask is true."""
    rng = numpy.random.default_rng(1)
    lengths = numpy.array([2, 5, 3, 4])
    for length, filler in ((5, 0.0), (9, 0.0), (9, 1e3)):
        mask = numpy.arange(length) < lengths[:, None]
        tokens = numpy.random.default_rng(2).normal(3, 2, (mask.sum(), 3))
        x = numpy.full((*mask.shape, 3), filler)
        x[mask] = tokens
        where = f"padded to {length} with {filler:g}"
        given = x.copy()
        got = array(answer(given, mask), x.shape)
        assert (given == x).all(), f"it changed its input ({where})"
        wanted, _ = reference.batch_norm(tokens)
        says("real tokens", got[mask], wanted, where)
        says("filler", got[~mask], numpy.zeros_like(got[~mask]), where)
    x = rng.normal(size=(2, 3, 4))
    every = numpy.ones((2, 3), dtype=bool)
    wanted, _ = reference.batch_norm(x.reshape(6, 4))
    got = array(answer(x, every), x.shape).reshape(6, 4)
    says("output", got, wanted, "all tokens are real")


@exercise(
    "ch5-channels-last",
    "reshape keeps the order in memory. Which values stand next to each "
    "other in (N, H, W, C)?",
    "Cut the last axis: reshape to (N, H * W, groups, C // groups), and ask "
    "which two of these axes share a mean.",
)
def channels_last(answer) -> None:
    """Group norm of (N, H, W, C)."""
    rng = numpy.random.default_rng(3)
    for shape, groups in (((2, 4, 3, 6), 2), ((3, 2, 2, 8), 4)):
        x = rng.normal(numpy.arange(shape[-1]), 2.0, size=shape)
        first = numpy.moveaxis(x, -1, 1)
        wanted, _ = reference.group_norm(first, groups, eps=1e-3)
        wanted = numpy.moveaxis(wanted, 1, -1)
        got = array(answer(x.copy(), groups, 1e-3), shape)
        says("output", got, wanted, f"shape {shape}, {groups} groups")


@exercise(
    "ch5-rms-backward",
    "Two arrows leave x: to x * r, with slope r, and to the mean square, "
    "where entry x_i appears once, as x_i ** 2 / D.",
    "What is left is the line of the other norms without the mean of g: "
    "there is no mean to go back through. dweight sums over the rows.",
)
def rms_backward(answer) -> None:
    """``rms_backward(dy, x, weight, eps)``: dx and dweight of (N, D)."""
    rng = numpy.random.default_rng(4)
    for eps in (1e-5, 0.5):
        x, dy = rng.normal(1.0, 2.0, size=(2, 6, 5))
        weight = rng.uniform(0.5, 2, 5)
        got = unpacked(answer(dy, x, weight, eps), "dx", "dweight")
        _, cache = reference.rms_norm(x, (5,), weight, eps)
        dx, dweight, _ = reference.normalize_backward(dy, cache)
        pairs = (("dx", dx), ("dweight", dweight.ravel()))
        for mine, (name, right) in zip(got, pairs, strict=True):
            says(name, array(mine, right.shape), right, f"{eps=}")


_BLIND = ((1,), (0, 1), (3,))


@exercise(
    "ch5-blind",
    "A change goes unnoticed if it is the same for all values that share a "
    "mean. Write down for each norm which indices such a set has in common.",
    "Over (3,) a set is one row of one channel of one image. A change of one "
    "channel touches all of a set or nothing of it: it is not noticed.",
)
def blind(answer) -> None:
    """Which of six changes each of three norms does not notice."""
    has_keys(answer, _BLIND)
    for norm in _BLIND:
        letters = set | frozenset | list | tuple | str
        iterable = isinstance(answer[norm], letters)
        assert iterable, f"over {norm}: expected a set, got {answer[norm]!r}"
    right = {norm: _unnoticed(norm) for norm in _BLIND}
    wrong = [norm for norm in _BLIND if set(answer[norm]) != right[norm]]
    missed = "; ".join(
        f"over {norm}, {len(right[norm] ^ set(answer[norm]))} of the letters"
        for norm in wrong
    )
    assert not wrong, f"not right yet: {missed}"


def _unnoticed(over: tuple[int, ...]) -> set[str]:
    x = numpy.random.default_rng(5).normal(1, 1, (3, 4, 5, 6))

    def norm(x):
        centered = x - x.mean(over, keepdims=True)
        return centered / x.std(over, keepdims=True)

    changes = {
        "A": (3, 0, numpy.s_[1]),
        "B": (1, 3, numpy.s_[1]),
        "C": (3, 0, numpy.s_[:, 2]),
        "D": (1, 3, numpy.s_[:, 2]),
        "E": (1, 3, numpy.s_[:, :, 1, 4]),
        "F": (1, 3, numpy.s_[:, :, 1]),
    }
    found = set()
    for letter, (factor, shift, part) in changes.items():
        changed = x.copy()
        changed[part] = factor * changed[part] + shift
        if numpy.abs(norm(changed) - norm(x)).max() < 1e-9:
            found.add(letter)
    return found
