"""Answers to the exercises of chapter 9, right and wrong."""

import numpy as np
import torch


def shifted(blocks):
    """One pass, less the first value."""
    shift, count, total, squares = None, 0, np.float32(0), np.float32(0)
    for block in blocks:
        if shift is None:
            shift = block[0]
        rest = block - shift
        count += len(rest)
        total += rest.sum()
        squares += (rest * rest).sum()
    mean = total / count
    return shift + mean, squares / count - mean * mean


def merged(blocks):
    count, mean, var = 0, np.float32(0), np.float32(0)
    for block in blocks:
        share = len(block) / (count + len(block))
        delta = block.mean() - mean
        mean = mean + np.float32(share) * delta
        var = (1 - share) * var + share * block.var()
        var = var + share * (1 - share) * delta**2
        count += len(block)
    return mean, var


def textbook(blocks):
    count, total, squares = 0, np.float32(0), np.float32(0)
    for block in blocks:
        count += len(block)
        total += block.sum()
        squares += (block * block).sum()
    mean = total / count
    return mean, squares / count - mean * mean


def clipped(blocks):
    mean, var = textbook(blocks)
    return mean, max(var, 0)


def float32_welford(blocks):
    count, mean, m2 = np.float32(0), np.float32(0), np.float32(0)
    for block in blocks:
        for value in block:
            count += np.float32(1)
            delta = value - mean
            mean += delta / count
            m2 += delta * (value - mean)
    return mean, m2 / count


def wide(blocks):
    x = np.concatenate([b.astype(np.float64) for b in blocks])
    return x.mean(), x.var()


def wide_means(blocks):
    """Blocks merged, but with means in float64."""
    count, mean, var = 0, 0.0, 0.0
    for block in blocks:
        share = len(block) / (count + len(block))
        middle = block.sum(dtype=np.float64) / len(block)
        within = ((block - middle) ** 2).mean()
        delta = middle - mean
        mean += share * delta
        var = (1 - share) * (var + share * delta**2) + share * within
        count += len(block)
    return mean, var


def wide_copies(blocks):
    x = np.concatenate([np.array(b, np.float64) for b in blocks])
    return x.mean(), x.var()


def python_numbers(blocks):
    """float32 sums, and at the end numbers of Python's."""
    shift, count, total, squares = None, 0, np.float32(0), np.float32(0)
    for block in blocks:
        shift = block[0] if shift is None else shift
        rest = block - shift
        count += len(rest)
        total += rest.sum()
        squares += (rest * rest).sum()
    mean = float(total) / count
    return float(shift) + mean, float(squares) / count - mean**2


def averaged(blocks):
    both = [(b.mean(), b.var()) for b in blocks]
    return tuple(np.mean(both, axis=0))


def powers(**bits):
    bits = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53} | bits
    return {name: 2.0 ** (p / 4) for name, p in bits.items()}


def merge(between=True, skip=True, square=False):
    def answer(count, mean, m2):
        if skip:
            count, mean, m2 = (v[count > 0] for v in (count, mean, m2))
        share = (count / count.sum()).astype(np.float32)
        start = np.float32(0) if square else mean[0]
        away = mean - start
        middle = (share * away).sum()
        var = m2.sum() / count.sum()
        if square:
            var += (share * away**2).sum() - middle**2
        elif between:
            var += (share * (away - middle) ** 2).sum()
        return start + middle, var

    return answer


def stall(keep=True, dtype=torch.bfloat16):
    def answer(running, rest, new, momentum):
        step = momentum * (new - running.float())
        if keep:
            step = step + rest.float()
        wanted = running.float() + step
        moved = wanted.to(dtype)
        return moved, (wanted - moved.float()).bfloat16()

    return answer


RIGHT = {
    "ch9-one-pass": shifted,
    "ch9-offset": powers(),
    "ch9-merge": merge(),
    "ch9-stall": stall(),
    "ch9-order": {0.0, 1.0, 2.0},
}

ALSO_RIGHT = {
    "ch9-one-pass": {
        "merged blocks": merged,
        "Python's numbers at the end": python_numbers,
    },
    "ch9-offset": {
        "rounded": {
            "float16": 7,
            "bfloat16": 4,
            "float32": 60,
            "float64": 1e4,
        }
    },
    "ch9-order": {
        kind.__name__: kind([0, 1, 2])
        for kind in (list, tuple, frozenset, np.array, iter)
    },
}

WRONG = {
    "ch9-one-pass": {
        "the textbook formula": textbook,
        "clipped at 0": clipped,
        "in float64": wide,
        "means in float64": wide_means,
        "copies in float64": wide_copies,
        "average of the variances": averaged,
        "the mean forgotten": lambda blocks: shifted(blocks)[1],
        "all blocks kept": lambda blocks: shifted(list(blocks)),
        "a mean near the values": float32_welford,
    },
    "ch9-offset": {
        "no digit left": {name: v**2 for name, v in powers().items()},
        "bfloat16 as float16": powers(bfloat16=11),
        "one left open": powers() | {"float16": None},
        "one missing": {"float32": 64.0},
        "a list": [6.7, 4, 64, 9742],
        "negative": powers() | {"float32": -64.0},
    },
    "ch9-merge": {
        "within alone": merge(between=False),
        "empty parts count": merge(skip=False),
        "squares of the means": merge(square=True),
        "one number": lambda *args: merge()(*args)[1],
    },
    "ch9-stall": {
        "nothing kept": stall(keep=False),
        "the last batch alone": lambda r, rest, new, m: (new.bfloat16(), rest),
        "another momentum": lambda r, rest, new, m: stall()(r, rest, new, 0.5),
        "kept in float32": stall(dtype=torch.float32),
        "the rest forgotten": lambda *args: stall()(*args)[0],
    },
    "ch9-order": {
        "the right sum alone": {2.0},
        "one too many": {0.0, 1.0, 2.0, 3.0},
        "one missing": {0.0, 2.0},
        "a number": 2.0,
    },
}
