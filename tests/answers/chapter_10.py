"""Answers to the exercises of chapter 10, right and wrong."""

from normlib import blocks
from normlib.exercises.chapter_10 import (
    _PASSES,
    BANDWIDTH,
    LAUNCH,
    MULTIPROCESSORS,
)

tl = blocks.language


def rms(divide_by_block=False, mask=True, twice=False, eps=True, weigh=True):
    def kernel(x_ptr, weight_ptr, y_ptr, columns, eps_, BLOCK: tl.constexpr):
        row, column = tl.program_id(0), tl.arange(0, BLOCK)
        inside = column < columns if mask else None
        at = row * columns + column
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        size = BLOCK if divide_by_block else columns
        square = tl.sum(x * x, 0) / size + (eps_ if eps else 0.0)
        if twice:
            x = tl.load(x_ptr + at, mask=inside, other=0.0)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
        y = x / tl.sqrt(square) * (weight if weigh else 1.0)
        tl.store(y_ptr + at, y, mask=inside)

    return kernel


def one_row_for_all(x_ptr, weight_ptr, y_ptr, columns, eps, BLOCK):
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + column, mask=column < columns)
    tl.store(y_ptr + column, x, mask=column < columns)


def layer(size=False, filler=False, one_pass=False, mask=True):
    def kernel(x_ptr, y_ptr, columns, eps, BLOCK: tl.constexpr):
        row, column = tl.program_id(0), tl.arange(0, BLOCK)
        inside = column < columns
        at = row * columns + column
        x = tl.load(x_ptr + at, mask=inside if mask else None, other=0.0)
        mean = tl.sum(x, 0) / (BLOCK if size else columns)
        rest = x - mean if filler else tl.where(inside, x - mean, 0.0)
        var = tl.sum(rest * rest, 0) / (BLOCK if size else columns)
        if one_pass:
            var = tl.sum(x * x, 0) / columns - mean * mean
        y = rest / tl.sqrt(var + eps)
        tl.store(y_ptr + at, y, mask=inside)

    return kernel


def sums(step=True, own=True, twice=False, bias=True):
    def kernel(dy_ptr, xhat_ptr, dweight_ptr, dbias_ptr, rows, columns, BLOCK):
        column = tl.arange(0, BLOCK)
        inside = column < columns
        dweight = tl.zeros((BLOCK,), tl.float32)
        dbias = tl.zeros((BLOCK,), tl.float32)
        me, all_ = tl.program_id(0), tl.num_programs(0)
        for row in range(me, rows, all_ if step else 1):
            at = row * columns + column
            dy = tl.load(dy_ptr + at, mask=inside, other=0.0)
            dweight += dy * tl.load(xhat_ptr + at, mask=inside, other=0.0)
            if twice:
                dy = tl.load(dy_ptr + at, mask=inside, other=0.0)
            dbias += dy
        part = (me if own else 0) * columns + column
        tl.store(dweight_ptr + part, dweight, mask=inside)
        if bias:
            tl.store(dbias_ptr + part, dbias, mask=inside)

    return kernel


def unwritten(*args, **constants):
    raise NotImplementedError


def plan(launches=2, least=True):
    def answer(rows, columns):
        size = 4 * rows * columns
        share = min(1, rows / MULTIPROCESSORS) if least else 1
        one = LAUNCH + 2 * size / (BANDWIDTH * share)
        two = launches * LAUNCH + 3 * size / BANDWIDTH
        return "row" if one < two else "split"

    return answer


RIGHT = {
    "ch10-bytes": dict(_PASSES),
    "ch10-row": rms(),
    "ch10-bug": layer(),
    "ch10-partials": sums(),
    "ch10-faster": plan(),
}

OPEN = {
    "ch10-bytes": _PASSES | {"layer norm, backward": None},
    "ch10-row": unwritten,
    "ch10-bug": unwritten,
    "ch10-partials": unwritten,
    "ch10-faster": unwritten,
}

WRONG = {
    "ch10-bytes": {
        "the sum is thrown away": _PASSES
        | {"add, RMS norm and SiLU, forward, fused": 3},
        "the ReLU's input is read": _PASSES
        | {"batch norm and ReLU, backward, fused": 7},
        "one missing": {"layer norm, backward": 3},
        "a list": [2, 3, 3, 5, 5, 4],
    },
    "ch10-row": {
        "the filler counts": rms(divide_by_block=True),
        "no mask": rms(mask=False),
        "read twice": rms(twice=True),
        "no eps": rms(eps=False),
        "no weight": rms(weigh=False),
        "one row for all": one_row_for_all,
    },
    "ch10-bug": {
        "the filler counts": layer(size=True),
        "the filler has a variance": layer(filler=True),
        "one pass": layer(one_pass=True),
        "no mask": layer(mask=False),
    },
    "ch10-partials": {
        "every program takes all rows": sums(step=False),
        "all write to one place": sums(own=False),
        "read twice": sums(twice=True),
        "no dbias": sums(bias=False),
    },
    "ch10-faster": {
        "one launch": plan(launches=1),
        "every multiprocessor works": plan(least=False),
        "always": lambda rows, columns: "row",
    },
}


SAID = {
    "ch10-row": {
        "no mask": "a mask is missing or wrong",
        "read twice": "bytes are moved",
    },
    "ch10-partials": {"all write to one place": "programs 0 and 1"},
    "ch10-faster": {"every multiprocessor works": "microseconds"},
}
