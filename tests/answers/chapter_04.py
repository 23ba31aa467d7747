"""Answers to the exercises of chapter 4, right and wrong."""

import math

import numpy as np
import torch
from torch import nn


def debiased(subtract=True, divide=True, swapped=False):
    def answer(batches, momentum, start):
        if swapped:
            momentum = 1 - momentum
        a, found = start, []
        for t, value in enumerate(batches, 1):
            a = (1 - momentum) * a + momentum * value
            left = (1 - momentum) ** t
            corrected = a - left * start if subtract else a
            found.append(corrected / (1 - left) if divide else corrected)
        return found

    return answer


def steps(weight=lambda decay: decay, whole=math.ceil):
    def answer(decay, share):
        return whole(math.log(share) / math.log(weight(decay)))

    return answer


def naive(batches):
    batches = list(batches)
    return tuple(
        np.mean([getattr(b, name)(0) for b in batches], axis=0)
        for name in ("mean", "var")
    )


def one_pass(batches):
    count, total, square = 0, 0.0, 0.0
    for b in batches:
        count, total = count + len(b), total + b.sum(0)
        square = square + (b**2).sum(0)
    return total / count, square / count - (total / count) ** 2


def merged(between=True, bessel=0):
    def answer(batches):
        count = 0
        for b in batches:
            if count == 0:
                mean, var = np.zeros(b.shape[1]), np.zeros(b.shape[1])
            p = len(b) / (count + len(b))
            delta = b.mean(0) - mean
            var = (1 - p) * var + p * b.var(0)
            if between:
                var = var + p * (1 - p) * delta**2
            mean = mean + p * delta
            count += len(b)
        return mean, var * count / (count - bessel)

    return answer


def dropout(
    factor=lambda p: p / (1 - p),
    of=lambda x: x**2,
    variance=lambda x, w: (x @ w).var(),
):
    def answer(x, w, p):
        return 1 + factor(p) * of(x).mean(0) @ w**2 / variance(x, w)

    return answer


def as_one_unit(x, w, p):
    z = x @ w
    return ((z**2).mean() / (1 - p) - z.mean() ** 2) / z.var()


def fold(axis=None, eps=True, scaled=True, inplace=False):
    def answer(layer, norm):
        rstd = (norm.running_var + (norm.eps if eps else 0)).rsqrt()
        a = rstd if norm.weight is None else norm.weight * rstd
        c = -a * norm.running_mean
        if norm.bias is not None:
            c = c + norm.bias
        transposed = isinstance(layer, nn.ConvTranspose2d)
        where = int(transposed) if axis is None else axis
        scale = a.reshape([-1 if i == where else 1 for i in range(4)])
        weight = layer.weight * scale
        if layer.bias is not None:
            c = c + (a if scaled else 1) * layer.bias
        if inplace:
            layer.weight.data.copy_(weight)
        return weight, c

    return answer


class Repaired(nn.Module):
    buffers_made = attached = by_gradients = unbiased = moves = False
    constant = False

    def __init__(self, units, momentum=0.1, eps=1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(units))
        self.bias = nn.Parameter(torch.zeros(units))
        for name, start in (("running_mean", 0.0), ("running_var", 1.0)):
            value = torch.full((units,), start)
            if self.buffers_made:
                setattr(self, name, value)
            else:
                self.register_buffer(name, value)

    def forward(self, x):
        training = self.training
        if self.by_gradients:
            training = torch.is_grad_enabled()
        mean, var = self.running_mean, self.running_var
        if training or self.moves:
            found = x.mean(0), x.var(0, correction=0)
            if self.constant:
                found = [v.detach() for v in found]
            if training:
                mean, var = found
            m = self.momentum
            kept = found if self.attached else [v.detach() for v in found]
            factor = len(x) / (len(x) - 1) if self.unbiased else 1.0
            self.running_mean = (1 - m) * self.running_mean + m * kept[0]
            self.running_var = (1 - m) * self.running_var + m * factor * kept[
                1
            ]
        xhat = (x - mean) / torch.sqrt(var + self.eps)
        return self.weight * xhat + self.bias


def repaired(**slips):
    return type("Layer", (Repaired,), slips)


RIGHT = {
    "ch4-debias": debiased(),
    "ch4-steps": steps(),
    "ch4-merge": merged(),
    "ch4-dropout": dropout(),
    "ch4-fold": fold(),
    "ch4-forgets": Repaired,
}

ALSO_RIGHT = {
    "ch4-merge": {"a list": lambda *args: list(merged()(*args))},
    "ch4-fold": {"a list": lambda *args: list(fold()(*args))},
}

WRONG = {
    "ch4-debias": {
        "not corrected": debiased(subtract=False, divide=False),
        "Adam's, for a start at 0": debiased(subtract=False),
        "subtracted only": debiased(divide=False),
        "the weight of the past": debiased(swapped=True),
        "the last one only": lambda *args: debiased()(*args)[-1],
    },
    "ch4-steps": {
        "the weight of the new": steps(weight=lambda decay: 1 - decay),
        "one too few": steps(whole=math.floor),
        "no whole number": steps(whole=float),
    },
    "ch4-merge": {
        "averages of the batches": naive,
        "mean of squares": one_pass,
        "nothing between": merged(between=False),
        "unbiased": merged(bessel=1),
        "mean only": lambda batches: naive(batches)[0],
    },
    "ch4-dropout": {
        "the sum as one unit": as_one_unit,
        "dropout without its scale": dropout(factor=lambda p: p * (1 - p)),
        "variance for mean square": dropout(of=lambda x: x - x.mean(0)),
        "units taken as independent": dropout(
            variance=lambda x, w: x.var(0) @ w**2
        ),
        "for each unit": lambda x, w, p: dropout()(x, w, p) * np.ones(4),
    },
    "ch4-fold": {
        "the chapter's": fold(axis=0),
        "eps forgotten": fold(eps=False),
        "the bias not scaled": fold(scaled=False),
        "the layer changed": fold(inplace=True),
        "weight only": lambda *args: fold()(*args)[0],
    },
    "ch4-forgets": {
        "plain tensors": repaired(buffers_made=True),
        "with the graph": repaired(attached=True),
        "asks for gradients": repaired(by_gradients=True),
        "other arithmetic": repaired(unbiased=True),
        "moves in evaluation": repaired(moves=True),
        "statistics as constants": repaired(constant=True),
    },
}


SAID = {
    "ch4-merge": {"mean of squares": "mean about 1e+06"},
    "ch4-fold": {"the chapter's": "raised RuntimeError"},
    "ch4-forgets": {
        "plain tensors": "running_mean is not in the state_dict",
        "with the graph": "running_mean keeps the graph of its batches",
        "asks for gradients": "evaluation must not move it",
        "moves in evaluation": "evaluation must not move it",
        "statistics as constants": "gradient in training",
    },
}
