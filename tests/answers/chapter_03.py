"""Answers to the exercises of chapter 3, right and wrong."""

import math

import numpy as np


def impostor(scale=1.0, sign=1.0, fourth=None):
    def answer(skewness):
        p = (1 - sign * skewness / math.sqrt(4 + skewness**2)) / 2
        if fourth:
            p = 0.5
        return scale * math.sqrt((1 - p) / p), -math.sqrt(p / (1 - p)), p

    return answer


def shift(mixed=True, both=False, factor=2.0, fresh_error=True):
    def answer(w1, w2, x, t, lr):
        n = len(x)
        h = x @ w1.T
        e = h @ w2.T - t
        g1, g2 = factor / n * (e @ w2).T @ x, factor / n * e.T @ h
        if not mixed:
            return g2, g2
        if both:
            w2 = w2 - lr * g2
        h = x @ (w1 - lr * g1).T
        if fresh_error:
            e = h @ w2.T - t
        return g2, factor / n * e.T @ h

    return answer


def length(decays=True, squared=False, straight=False):
    def answer(start, lr, decay, gradients):
        square = start**2
        for g in gradients:
            if decays:
                square *= (1 - lr * decay) ** 2
            square += (lr * g) ** 2
        if straight:
            return start + lr * sum(gradients)
        return square if squared else math.sqrt(square)

    return answer


def effective(h, w):
    g = h @ w
    return np.linalg.norm(h @ g) / np.linalg.norm(g)


def largest(h, w=None):
    return np.abs(np.linalg.eigvalsh(h)).max()


def revealing(h):
    values, vectors = np.linalg.eigh(h)
    return vectors[:, np.abs(values).argmax()]


def rayleigh(h, w):
    return w @ h @ w / (w @ w)


def most_positive(h):
    return np.linalg.eigh(h)[1][:, -1]


RIGHT = {
    "ch3-impostor": impostor(),
    "ch3-break": 8.0,
    "ch3-shift": shift(),
    "ch3-length": length(),
    "ch3-beta": (effective, revealing),
}

WRONG = {
    "ch3-impostor": {
        "not standardized": impostor(scale=2.0),
        "the mirror image": impostor(sign=-1.0),
        "a coin": impostor(fourth=1),
        "no share": lambda skewness: impostor()(skewness)[:2],
    },
    "ch3-break": {
        "the paper's": 0.5,
        "far too much": 100.0,
        "negative": -1.0,
        "a list": [8.0, 16.0],
    },
    "ch3-shift": {
        "nothing moves": shift(mixed=False),
        "both move": shift(both=True),
        "half of it": shift(factor=1.0),
        "the old error": shift(fresh_error=False),
        "G alone": lambda *args: shift()(*args)[0],
    },
    "ch3-length": {
        "no decay": length(decays=False),
        "the square": length(squared=True),
        "in a straight line": length(straight=True),
    },
    "ch3-beta": {
        "the largest curvature": (largest, revealing),
        "the curvature along w": (rayleigh, revealing),
        "the largest, not in size": (effective, most_positive),
        "anywhere": (effective, lambda h: np.ones(len(h))),
        "at the minimum": (effective, lambda h: np.zeros(len(h))),
        "one function": effective,
    },
}


SAID = {
    "ch3-break": {
        "the paper's": "with n_mu=0.5 it still learns",
        "far too much": "a quarter, n_mu=25, it is broken already",
    },
}
