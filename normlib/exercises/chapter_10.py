"""Checks of chapter 10: kernels run on the block machine, and are counted."""

import numpy

from normlib import blocks
from normlib.exercises import exercise
from normlib.exercises.compare import array, has_keys, says

_PASSES = {
    "batch norm, evaluation, forward": 2,
    "batch norm, training, forward": 3,
    "layer norm, backward": 3,
    "batch norm, training, backward": 5,
    "add, RMS norm and SiLU, forward, apart": 7,
    "add, RMS norm and SiLU, forward, fused": 4,
    "batch norm and ReLU, backward, apart": 8,
    "batch norm and ReLU, backward, fused": 5,
}


@exercise(
    "ch10-bytes",
    "A pass is a tensor of the size of x that is read or written once. Write "
    "down, for each kernel, what it must read and what somebody needs "
    "afterwards.",
    "Does a row fit into the cache, so that its second reading is free? And "
    "the sum of x and the residual is needed twice: by the norm, and by the "
    "residual connection that goes on. And from what is in registers the "
    "slope of an activation can be computed.",
)
def least_passes(answer) -> None:
    """``{what: passes}``: tensor passes that cannot be avoided."""
    has_keys(answer, _PASSES)
    if None in answer.values():
        raise NotImplementedError
    wrong = [
        name
        for name, value in answer.items()
        if array(value, ()) != _PASSES[name]
    ]
    assert not wrong, f"not right: {'; '.join(wrong)}"


@exercise(
    "ch10-row",
    "One program, one row: row = tl.program_id(0). Its columns are a block "
    "of BLOCK, of which only those below `columns` exist: a mask for each "
    "load and store.",
    "Load the row once and keep it: x = tl.load(x_ptr + row * columns + "
    "column, mask=..., other=0.0). The zeros that fill the block add nothing "
    "to a sum of squares; but how many values is the mean over?",
)
def row_kernel(answer) -> None:
    """RMS norm: ``kernel(x_ptr, weight_ptr, y_ptr, columns, eps, BLOCK)``."""
    for rows, columns, block in ((3, 64, 64), (4, 40, 64), (5, 1, 2)):
        rng = numpy.random.default_rng(rows)
        x, weight = _normal(rng, rows, columns), _normal(rng, columns)
        y = numpy.full_like(x, numpy.nan)
        where = f"{rows} rows of {columns}, BLOCK={block}"
        found = _launched(
            answer, (rows,), x, weight, y, columns, 0.01, BLOCK=block
        )
        x = x.astype(float)
        exact = x / numpy.sqrt((x**2).mean(1, keepdims=True) + 0.01) * weight
        says("y", y, exact, where)
        least = 4 * (3 * rows * columns)
        assert found.moved <= least, (
            f"right, but {found.moved} bytes are moved where {least} suffice "
            f"({where})"
        )


@exercise(
    "ch10-bug",
    "Try it by hand: a row of 3 values in a block of 4. What stands in the "
    "fourth place after the load, and what after the mean is subtracted?",
    "Three questions: what is loaded beyond the row, over how many values is "
    "a mean, and what is left of the variance of values around 10,000? Of "
    "centered values it is exact, but there the filler is no longer 0.",
)
def bug(answer) -> None:
    """Layer norm: ``kernel(x_ptr, y_ptr, columns, eps, BLOCK)``."""
    for rows, columns, block, mean in (
        (2, 8, 8, 0.0),
        (3, 40, 64, 2.0),
        (3, 64, 64, 1e4),
        (3, 33, 64, 1e4),
    ):
        rng = numpy.random.default_rng(columns)
        x = _normal(rng, rows, columns) + numpy.float32(mean)
        y = numpy.full_like(x, numpy.nan)
        _launched(answer, (rows,), x, y, columns, 1e-3, BLOCK=block)
        exact = x.astype(float)
        exact = exact - exact.mean(1, keepdims=True)
        var = (exact**2).mean(1, keepdims=True)
        exact = exact / numpy.sqrt(var + 1e-3)
        where = f"{columns} columns, BLOCK={block}, mean {mean:g}"
        assert numpy.isfinite(y).all(), f"y: NaN or infinity ({where})"
        worst = numpy.abs(y - exact).max()
        assert worst < 1e-2, f"y is off by {worst:.2g} ({where})"


@exercise(
    "ch10-partials",
    "A program takes the rows program, program + programs, program + 2 "
    "programs, ...: range(tl.program_id(0), rows, tl.num_programs(0)).",
    "Two blocks of zeros before the loop, tl.zeros((BLOCK,), tl.float32). "
    "Add to them in the loop; store them once behind it, in the row of "
    "partial sums that is the program's own.",
)
def partials(answer) -> None:
    """A row of partial sums for each program.

    ``kernel(dy_ptr, xhat_ptr, dweight_ptr, dbias_ptr, rows, columns, BLOCK)``
    """
    for rows, columns, block, programs in (
        (6, 8, 8, 6),
        (13, 24, 32, 4),
        (7, 5, 8, 1),
    ):
        rng = numpy.random.default_rng(rows)
        dy, xhat = (_normal(rng, rows, columns) for _ in range(2))
        sums = numpy.full((2, programs, columns), numpy.nan, numpy.float32)
        found = _launched(
            answer,
            (programs,),
            *(dy, xhat, sums[0], sums[1], rows, columns),
            BLOCK=block,
        )
        where = f"{rows} rows of {columns}, {programs} programs"
        empty = int(numpy.isnan(sums).any(2).sum())
        assert not empty, f"{empty} rows of partial sums not written ({where})"
        dweight = (dy.astype(float) * xhat).sum(0)
        says("the sum of the parts of dweight", sums[0].sum(0), dweight, where)
        says("the sum of the parts of dbias", sums[1].sum(0), dy.sum(0), where)
        least = 4 * (2 * rows + 2 * programs) * columns
        assert found.moved <= least, (
            f"right, but {found.moved} bytes are moved where {least} suffice "
            f"({where})"
        )


LAUNCH, BANDWIDTH, MULTIPROCESSORS = 5e-6, 3e12, 128
"""The machine of the exercise ch10-faster: seconds, bytes a second."""


@exercise(
    "ch10-faster",
    "The time of each plan is its launches, plus its bytes divided by the "
    "bandwidth that it reaches. How many multiprocessors work in plan row?",
    "Plan row: LAUNCH + 2 passes / (BANDWIDTH * min(1, rows / "
    "MULTIPROCESSORS)). Plan split: two launches and three passes, at full "
    "bandwidth.",
)
def faster(answer) -> None:
    """``plan(rows, columns)``: "row" or "split"."""
    for rows, columns in (
        (4096, 4096),
        (64, 1_000_000),
        (1, 100_000_000),
        (1, 1000),
        (128, 1_000_000),
        (100, 1_000_000),
        (16, 100_000),
        (16, 10_000),
        (84, 50_000_000),
        (87, 50_000_000),
    ):
        size = 4 * rows * columns
        share = min(1, rows / MULTIPROCESSORS)
        one = LAUNCH + 2 * size / (BANDWIDTH * share)
        two = 2 * LAUNCH + 3 * size / BANDWIDTH
        right = "row" if one < two else "split"
        got = answer(rows, columns)
        assert got == right, (
            f"{rows} rows of {columns:,}: got {got!r}; a program for a row "
            f"takes {one * 1e6:.1f} microseconds, the split {two * 1e6:.1f}"
        )


def _normal(rng, *shape):
    return rng.standard_normal(shape).astype(numpy.float32)


def _launched(kernel, grid, *args, **constants):
    try:
        return blocks.launch(kernel, grid, *args, **constants)
    except NotImplementedError:
        raise
    except (IndexError, RuntimeError) as error:
        raise AssertionError(str(error)) from None
