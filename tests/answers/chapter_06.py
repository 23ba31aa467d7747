"""Answers to the exercises of chapter 6, right and wrong."""

import math

import numpy as np


def growth(squared=True, centered=True, slopes=np.gradient):
    def answer(act):
        z = np.linspace(-10, 10, 200_001)
        w = np.exp(-z * z / 2)
        w /= w.sum()
        y = act(z)
        variance = (w * y**2).sum() - centered * (w * y).sum() ** 2
        ratio = (w * slopes(y, z) ** 2).sum() / variance
        return math.sqrt(ratio) if squared else ratio

    return answer


V = (math.pi - 1) / math.pi


def depth(root=True, stream=V, scaled=True, first=1):
    def answer(count, kind):
        if kind == "plain":
            square = (1 / V) ** (count - first)
        else:
            s = 1 / count if kind == "scaled" and scaled else 1.0
            square = math.prod(
                1 + s / (1 + s * stream * k) for k in range(count)
            )
        return math.sqrt(square) if root else square

    return answer


def values(up=True, squared=True, whole=True):
    def answer(side, strides, least):
        for stride in strides:
            side = -(-side // stride) if up else max(side // stride, 1)
        images = least / (side**2 if squared else side)
        return math.ceil(images) if whole else images

    return answer


def ghost(bessel=True, normalizer=0, moves="each", cut="rows"):
    def answer(x, size, momentum):
        n = len(x)
        if cut == "rows":
            parts = x.reshape(n // size, size, -1)
        else:
            parts = x.reshape(size, n // size, -1).transpose(1, 0, 2)
        mean = parts.mean(1, keepdims=True)
        var = parts.var(1, keepdims=True, ddof=normalizer)
        y = ((parts - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
        means, variances = parts.mean(1), parts.var(1, ddof=int(bessel))
        if moves == "once":
            means, variances = (
                a.mean(0, keepdims=True) for a in (means, variances)
            )
        elif moves == "backwards":
            means, variances = means[::-1], variances[::-1]
        running_mean, running_var = np.zeros(x.shape[1]), np.ones(x.shape[1])
        for new_mean, new_var in zip(means, variances, strict=True):
            running_mean += momentum * (new_mean - running_mean)
            running_var += momentum * (new_var - running_var)
        return y, running_mean, running_var

    return answer


def leak(past="inclusive", axes=1, ddof=0):
    def answer(x, eps=1e-5):
        y = np.empty_like(x)
        for t in range(x.shape[1]):
            seen = {
                "inclusive": x[:, : t + 1],
                "all": x,
                "before": x[:, : max(t, 1)],
                "next": x[:, : t + 2],
            }[past]
            mean = seen.mean(axes, keepdims=True)
            var = seen.var(axes, keepdims=True, ddof=ddof)
            now = x[:, t : t + 1]
            y[:, t : t + 1] = (now - mean) / np.sqrt(var + eps)
        return y

    return answer


def cumulative(x, eps=1e-5):
    count = np.arange(1, x.shape[1] + 1).reshape(1, -1, 1)
    mean = x.cumsum(1) / count
    var = (x**2).cumsum(1) / count - mean**2
    return (x - mean) / np.sqrt(var + eps)


def influence(r=True, product=True, squares=True, ddof=0):
    def jacobian(x):
        m = len(x)
        xhat = (x - x.mean()) / x.std(ddof=ddof)
        inner = 1 + product * np.outer(xhat, xhat)
        return (np.eye(m) - inner / m) / (x.std(ddof=ddof) if r else 1)

    def share(x):
        power = jacobian(x) ** 2 if squares else np.abs(jacobian(x))
        return 1 - np.trace(power) / power.sum()

    return jacobian, share


RIGHT = {
    "ch6-growth": growth(),
    "ch6-depth": depth(),
    "ch6-values": values(),
    "ch6-ghost": ghost(),
    "ch6-leak": leak(),
    "ch6-influence": influence(),
}

ALSO_RIGHT = {"ch6-leak": {"sums so far": cumulative}}

WRONG = {
    "ch6-growth": {
        "the square": growth(squared=False),
        "mean square for the variance": growth(centered=False),
        "slope of one half": growth(slopes=lambda y, z: 0 * z + 0.5**0.5),
    },
    "ch6-depth": {
        "squares": depth(root=False),
        "the branch has variance 1": depth(stream=1.0),
        "a stream that does not grow": depth(stream=0.0),
        "not scaled": depth(scaled=False),
        "a first block like the others": depth(first=0),
    },
    "ch6-values": {
        "rounded down": values(up=False),
        "one side": values(squared=False),
        "a fraction": values(whole=False),
    },
    "ch6-ghost": {
        "biased running variance": ghost(bessel=False),
        "normalized by the unbiased": ghost(normalizer=1),
        "moved once": ghost(moves="once"),
        "moved backwards": ghost(moves="backwards"),
        "every other row": ghost(cut="strided"),
    },
    "ch6-leak": {
        "the whole sequence": leak("all"),
        "one step ahead": leak("next"),
        "without the present": leak("before"),
        "over sequences": leak(axes=(0, 1)),
        "over channels": leak(axes=(1, 2)),
        "raises": lambda x: x[99],
    },
    "ch6-influence": {
        "without r": influence(r=False),
        "without the deviation": influence(product=False),
        "absolute values": influence(squares=False),
        "unbiased": influence(ddof=1),
        "one function": influence()[0],
    },
}

SAID = {
    "ch6-leak": {
        "one step ahead": (
            "the output at step 3 moves with the input at step 4"
        ),
        "raises": "raised IndexError",
    },
}
