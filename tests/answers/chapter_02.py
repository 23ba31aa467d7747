"""Answers to the exercises of chapter 2, right and wrong."""

import torch

import normlib
from normlib.exercises.chapter_02 import SUSPECTS
from normlib.functional import batch_normalization, moments


def over(axes, power=0.5, ddof=0, of="xhat"):
    """A batch norm of channels-last arrays, with room for slips."""

    def answer(x, weight, bias, eps):
        mean = x.mean(axes, keepdims=True)
        var = x.var(axes, keepdims=True, ddof=ddof)
        xhat = (x - mean) / (var + eps) ** power
        return weight * (xhat if of == "xhat" else x) + bias

    return answer


def mean_only(dy, x, weight):
    g = dy * weight
    return g - g.mean(0), (dy * (x - x.mean(0))).sum(0), dy.sum(0)


class Recipe:
    momentum_of_old = True
    evaluates = True
    lasting = True

    def __init__(self, units, momentum=0.99):
        self.momentum = momentum
        self.scale = torch.ones(units, requires_grad=True)
        self.offset = torch.zeros(units, requires_grad=True)
        self.moving_mean = torch.zeros(units)
        self.moving_variance = torch.ones(units)

    def __call__(self, s1, training):
        if not self.lasting:
            self.scale = torch.ones_like(self.scale)
        mean, variance = self.moving_mean, self.moving_variance
        if training or not self.evaluates:
            mean, variance = moments(s1, [0])
        if training:
            old = self.momentum if self.momentum_of_old else 1 - self.momentum
            self.moving_mean = old * self.moving_mean + (1 - old) * mean
            self.moving_variance = (
                old * self.moving_variance + (1 - old) * variance
            )
        return batch_normalization(
            s1, mean, variance, self.offset, self.scale, 1e-3
        )


def variant(**slip):
    return type("Variant", (Recipe,), slip)


def ported(eps=None, momentum=lambda p: 1 - p):
    def answer(config):
        layer = normlib.BatchNorm2d(
            len(config["gamma"]),
            eps=eps or config["epsilon"],
            momentum=momentum(config["momentum"]),
        ).double()
        with torch.no_grad():
            for tensor, name in (
                (layer.weight, "gamma"),
                (layer.bias, "beta"),
                (layer.running_mean, "moving_mean"),
                (layer.running_var, "moving_variance"),
            ):
                tensor.copy_(torch.tensor(config[name]))
        return layer

    return answer


FINGERPRINTS = {"A": "variance", "B": "both", "C": "right", "D": "mean"}

RIGHT = {
    "ch2-repair": over(0),
    "ch2-channels-last": over((0, 1, 2)),
    "ch2-fingerprints": FINGERPRINTS,
    "ch2-mean-only": mean_only,
    "ch2-running": Recipe,
    "ch2-keras": ported(),
}

WRONG = {
    "ch2-repair": {
        "divides by the variance": over(0, power=1.0),
        "scales x": over(0, of="x"),
        "unbiased": over(0, ddof=1),
        "one mean for all": over(None),
    },
    "ch2-channels-last": {
        "axes of channels first": over((0, 2, 3)),
        "not over the batch": over((1, 2)),
        "only over the batch": over(0),
    },
    "ch2-fingerprints": {
        "two swapped": FINGERPRINTS | {"A": "mean", "D": "variance"},
        "all right": dict.fromkeys(SUSPECTS, "right"),
        "a letter missing": {"A": "variance"},
        "a list": ["variance", "both", "right", "mean"],
    },
    "ch2-mean-only": {
        "mean as a constant": lambda dy, x, w: (
            dy * w,
            *mean_only(dy, x, w)[1:],
        ),
        "dweight of x": lambda dy, x, w: (
            mean_only(dy, x, w)[0],
            (dy * x).sum(0),
            dy.sum(0),
        ),
        "dx only": lambda dy, x, w: mean_only(dy, x, w)[0],
    },
    "ch2-running": {
        "momentum of the new batch": variant(momentum_of_old=False),
        "batch statistics always": variant(evaluates=False),
        "parameters made by the call": variant(lasting=False),
    },
    "ch2-keras": {
        "momentum as it is": ported(momentum=lambda p: p),
        "PyTorch's eps": ported(eps=1e-5),
        "a layer of torch": lambda config: torch.nn.BatchNorm2d(4),
    },
}
