"""Checks of chapter 3: shapes, drift, gradients that turn, lengths, walks."""

import functools
import math

import numpy
import torch
from torch import nn

from normlib import data, models, training, variants
from normlib.exercises import exercise
from normlib.exercises.compare import array, says, unpacked


@exercise(
    "ch3-impostor",
    "Mean 0 and variance 1 leave one number free. Write both values in terms "
    "of p: high = sqrt((1 - p) / p), low = -sqrt(p / (1 - p)).",
    "Then the third moment is (1 - 2 * p) / sqrt(p * (1 - p)). Square it to "
    "solve for p * (1 - p), and choose the root by the sign.",
)
def impostor(answer) -> None:
    """Two standardized values of a given skewness."""
    for skewness in (0.0, 1.0, -2.0, 10.0):
        got = unpacked(answer(skewness), "high", "low", "p")
        high, low, p = (float(array(v, ())) for v in got)
        where = f"{skewness=}"
        assert 0 < p < 1, f"p: expected between 0 and 1, got {p:.4g} ({where})"
        assert high > low, f"high={high:.4g} is not above low={low:.4g}"
        for power, wanted in ((1, 0.0), (2, 1.0), (3, skewness)):
            moment = p * high**power + (1 - p) * low**power
            says(f"mean of x**{power}", moment, wanted, where)


@exercise(
    "ch3-break",
    "The noise's mean is drawn between -n and n, anew at each step. Two such "
    "draws are 2 / 3 * n apart on average: with 0.5, a third of a standard "
    "deviation.",
    "Where the jump between two steps is several times what the digits "
    "differ by, a sigmoid hears only the noise. Try 1, 2, 4, 8, ...",
)
def break_it(answer) -> None:
    """A noise that breaks the network, where a quarter of it does not."""
    n = float(array(answer, ()))
    assert n >= 0, f"n_mu must be at least 0, got {n:g}"
    lost = _with_noise(n)
    assert lost < 0.5, f"with n_mu={n:g} it still learns: {lost:.0%} right"
    kept = _with_noise(n / 4)
    assert kept > 0.8, (
        f"with a quarter, n_mu={n / 4:g}, it is broken already: "
        f"{kept:.0%} right"
    )


@functools.cache
def _with_noise(n: float) -> float:
    """Mean test accuracy of three sigmoid networks with noisy batch norm."""
    norm = functools.partial(variants.NoisyBatchNorm, n_mu=n)
    digits = _digits()
    found = []
    with torch.random.fork_rng():
        for seed in range(3):
            torch.manual_seed(seed)
            model = models.mlp(
                [64] + 8 * [64] + [10],
                norm=norm,
                act=nn.Sigmoid,
                init=nn.init.xavier_normal_,
                seed=seed,
            )
            run = training.fit(model, digits, lr=0.3, steps=100, seed=seed)
            found.append(run.accuracy)
    return sum(found) / len(found)


@functools.cache
def _digits() -> data.Split:
    """Of chapter 3: all pixels by one mean and one standard deviation."""
    split = data.split(data.digits())
    mean, std = split.x_train.mean(), split.x_train.std()
    return split._replace(
        x_train=(split.x_train - mean) / std,
        x_test=(split.x_test - mean) / std,
    )


@exercise(
    "ch3-shift",
    "With h = x @ w1.T and the error e = h @ w2.T - t, the gradient of w2 is "
    "2 / n * e.T @ h, and that of w1 is 2 / n * (e @ w2).T @ x.",
    "G' is the first of these once more, with h of the w1 that has taken its "
    "step, and with the old w2, also inside the error.",
)
def shift(answer) -> None:
    """G and G' of the second of two linear layers."""
    rng = numpy.random.default_rng(0)
    for n, lr in ((7, 0.1), (40, 0.01)):
        x, t = rng.normal(size=(n, 4)), rng.normal(size=(n, 2))
        w1, w2 = rng.normal(size=(3, 4)), rng.normal(size=(2, 3))
        got = answer(w1.copy(), w2.copy(), x.copy(), t.copy(), lr)
        got = unpacked(got, "G", "G'")
        first, second = (torch.tensor(w, requires_grad=True) for w in (w1, w2))
        before = _gradients(first, second, x, t)
        moved = (first - lr * before[0]).detach().requires_grad_()
        after = _gradients(moved, second, x, t)
        where = f"{n} examples, {lr=}"
        says("G", array(got[0], (2, 3)), before[1], where)
        says("G'", array(got[1], (2, 3)), after[1], where)


def _gradients(w1, w2, x, t) -> tuple[torch.Tensor, ...]:
    x, t = torch.from_numpy(x), torch.from_numpy(t)
    loss = (x @ w1.T @ w2.T - t).square().sum(1).mean()
    return torch.autograd.grad(loss, (w1, w2))


@exercise(
    "ch3-length",
    "Differentiate L(c * w) = L(w) by c at c = 1: the inner product of w and "
    "the gradient is 0, so a step is the long side of a right triangle.",
    "The decay shortens one of the short sides first: the square of the new "
    "length is ((1 - lr * decay) * old)**2 + (lr * gradient)**2.",
)
def length(answer) -> None:
    """The length of scale-invariant weights after training with decay."""
    for lr, decay, seed in ((0.5, 0.0, 0), (0.5, 0.1, 1), (2.0, 0.05, 2)):
        start, gradients, end = _descend(lr, decay, seed)
        got = array(answer(start, lr, decay, list(gradients)), ())
        says("length", got, end, f"{lr=}, {decay=}, {len(gradients)} steps")


def _descend(lr: float, decay: float, seed: int):
    """Lengths at the start, of the gradients and at the end of a descent."""
    rng = numpy.random.default_rng(seed)
    w, goal = rng.normal(size=5), rng.normal(size=5)
    start, gradients = math.sqrt(w @ w), []
    for _ in range(12):
        size = math.sqrt(w @ w)
        unit = w / size  # the loss is -goal @ unit
        g = -(goal - unit * (unit @ goal)) / size
        gradients.append(math.sqrt(g @ g))
        w = (1 - lr * decay) * w - lr * g
    return start, gradients, math.sqrt(w @ w)


@exercise(
    "ch3-beta",
    "The gradient at w is g = H w, and at w - s * g it is H (w - s * g): it "
    "has changed by s * H g, after a walk of length s * |g|.",
    "|H g| / |g| is the largest eigenvalue's size only where g is its "
    "eigenvector; and if w is one, so is g = H w.",
)
def beta(answer) -> None:
    """The effective beta of a quadratic, and where it is the largest."""
    pair = isinstance(answer, (tuple, list)) and len(answer) == 2
    assert pair, "expected the pair (effective_beta, revealing)"
    effective, revealing = answer
    rng = numpy.random.default_rng(0)
    for size in (2, 5):
        a = rng.normal(size=(size, size))
        w = rng.normal(size=size)
        for h, kind in ((a @ a.T, "positive"), (a + a.T, "indefinite")):
            g = h @ w
            where = f"{size} weights, H {kind}"
            wanted = math.sqrt((h @ g) @ (h @ g) / (g @ g))
            got = array(effective(h.copy(), w.copy()), ())
            says("effective beta", got, wanted, where)
            point = array(revealing(h.copy()), (size,))
            g = h @ point
            assert g @ g > 0, f"revealing: its gradient is 0 ({where})"
            read = math.sqrt((h @ g) @ (h @ g) / (g @ g))
            largest = numpy.abs(numpy.linalg.eigvalsh(h)).max()
            says("beta at your point", read, largest, where)
