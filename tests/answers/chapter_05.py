"""Answers to the exercises of chapter 5, right and wrong."""

import numpy as np


def norm(unbatched="", uncentered=("rms",), swapped=False, eps=1e-5):
    """The five norms by their axes, with room for slips."""

    def answer(x, kind, groups=1):
        n, c = x.shape[:2]
        cut = {"batch": c, "instance": c, "group": groups}.get(kind, 1)
        if swapped and kind == "group":
            cut = c // groups
        y = x.reshape(n, cut, -1)
        axes = (0, 2) if kind == "batch" and kind != unbatched else (2,)
        if kind not in uncentered:
            y = y - y.mean(axes, keepdims=True)
        square = (y**2).mean(axes, keepdims=True)
        return (y / np.sqrt(square + eps)).reshape(x.shape)

    return answer


def masked(of=lambda x, mask: x[mask], keep_filler=False):
    def answer(x, mask):
        tokens = of(x, mask).reshape(-1, x.shape[-1])
        y = (x - tokens.mean(0)) / np.sqrt(tokens.var(0) + 1e-5)
        return y if keep_filler else np.where(mask[..., None], y, 0)

    return answer


def last(view, axes):
    def answer(x, groups, eps):
        y = x.reshape(view(*x.shape, groups))
        mean, var = y.mean(axes, keepdims=True), y.var(axes, keepdims=True)
        return ((y - mean) / np.sqrt(var + eps)).reshape(x.shape)

    return answer


def by_groups(n, h, w, c, g):
    return n, h * w, g, c // g


def rms_backward(centered=False, power=1, rows=0):
    def answer(dy, x, weight, eps):
        rstd = 1 / np.sqrt((x**2).mean(1, keepdims=True) + eps)
        xhat, g = x * rstd, dy * weight
        dx = g - xhat * (g * xhat).mean(1, keepdims=True)
        if centered:
            dx = dx - g.mean(1, keepdims=True)
        return rstd**power * dx, (dy * xhat).sum(rows)

    return answer


BLIND = {(1,): set("ABEF"), (0, 1): set("EF"), (3,): set("ABCDF")}

RIGHT = {
    "ch5-axes": norm(),
    "ch5-masked": masked(),
    "ch5-channels-last": last(by_groups, (1, 3)),
    "ch5-rms-backward": rms_backward(),
    "ch5-blind": BLIND,
}

ALSO_RIGHT = {
    "ch5-rms-backward": {"a list": lambda *args: list(rms_backward()(*args))},
}

WRONG = {
    "ch5-axes": {
        "batch norm within a sample": norm(unbatched="batch"),
        "rms centered": norm(uncentered=()),
        "layer norm not centered": norm(uncentered=("rms", "layer")),
        "channels in a group for groups": norm(swapped=True),
    },
    "ch5-masked": {
        "filler in the statistics": masked(of=lambda x, mask: x),
        "filler normalized too": masked(keep_filler=True),
        "first sequence only": masked(of=lambda x, mask: x[0][mask[0]]),
    },
    "ch5-channels-last": {
        "stripes of the image": last(lambda n, h, w, c, g: (n, g, -1), 2),
        "each position": last(by_groups, 3),
        "over the batch": last(by_groups, (0, 1, 3)),
        "every g-th channel": last(
            lambda n, h, w, c, g: (n, h * w, c // g, g), (1, 2)
        ),
    },
    "ch5-rms-backward": {
        "layer norm's": rms_backward(centered=True),
        "rstd forgotten": rms_backward(power=0),
        "dweight over the entries": rms_backward(rows=1),
        "dx only": lambda *args: rms_backward()(*args)[0],
    },
    "ch5-blind": {
        "one letter too many": BLIND | {(3,): set("ABCDEF")},
        "one letter missing": BLIND | {(1,): set("ABE")},
        "a norm missing": {(1,): set("ABEF")},
        "a list": [set("ABEF"), set("EF"), set("ABCDF")],
        "one left open": BLIND | {(1,): None},
    },
}


SAID = {"ch5-masked": {"filler in the statistics": "padded to 5 with 0"}}
