"""Checks of chapter 6: growth, depth, counting values, ghosts, leaks."""

import math

import numpy

from normlib.exercises import exercise
from normlib.exercises.compare import array, says, unpacked


@exercise(
    "ch6-growth",
    "Take a fine grid of z with the weights of a standard Gaussian. The "
    "variance is a weighted mean of squares, less the square of the mean.",
    "The slope between two neighbouring points of the grid is a difference "
    "quotient; it belongs to the middle between them, and needs no derivative "
    "at the bend itself.",
)
def growth(answer) -> None:
    """The growth of the gradient for an activation without a derivative."""
    for name, act, wanted in _activations():
        got = float(answer(act))
        close = abs(got / wanted - 1) < 1.5e-3
        assert close, f"{name}: expected {wanted:.4f}, got {got:.4f}"


def _activations():
    def relu(z):
        return numpy.maximum(z, 0)

    yield "3 * z - 1", lambda z: 3 * z - 1, 1.0
    yield "ReLU", relu, math.sqrt(math.pi / (math.pi - 1))
    # Of a leaky ReLU with slope s: half of 1 + s^2, over the variance.
    s = 0.2
    variance = (1 + s**2) / 2 - (1 - s) ** 2 / (2 * math.pi)
    leaky = math.sqrt((1 + s**2) / 2 / variance)
    yield (
        "leaky ReLU, slope 0.2",
        lambda z: numpy.where(z > 0, z, s * z),
        leaky,
    )
    # Of z^2 + z: mean square slope 4 + 1, variance 2 + 1.
    yield "z**2 + z", lambda z: z**2 + z, math.sqrt(5 / 3)
    # Of sin: (1 + e^-2) / 2 over (1 - e^-2) / 2.
    e = math.exp(-2)
    yield "sin", numpy.sin, math.sqrt((1 + e) / (1 - e))


@exercise(
    "ch6-depth",
    "Mean squares multiply from block to block, and the ratio of the norms "
    "is the root of the product. The plain block has pi / (pi - 1), except "
    "the first: what variance does its batch norm divide by?",
    "With a factor s^2 on the branch's variance, the stream has the variance "
    "1 + s^2 * v * l with v = (pi - 1) / pi in front of block l, and the "
    "branch passes s^2 times the gradient, divided by that variance.",
)
def depth(answer) -> None:
    """The growth of the gradient over a stack of blocks."""
    v = (math.pi - 1) / math.pi
    for count in (1, 2, 10, 40):
        squares = {"plain": v ** (1 - count)}
        for kind, s in (("residual", 1.0), ("scaled", 1 / count)):
            factors = [1 + s / (1 + s * v * k) for k in range(count)]
            squares[kind] = math.prod(factors)
        for kind, square in squares.items():
            wanted = math.sqrt(square)
            got = float(array(answer(count, kind), ()))
            assert abs(got / wanted - 1) < 1e-4, (
                f"ratio: expected {wanted:.5g}, got {got:.5g} "
                f"(depth={count}, kind={kind!r})"
            )


@exercise(
    "ch6-values",
    "A channel has N * side * side values. Follow the side through the "
    "strides; it never grows, so which layer has the fewest?",
    "Divide `least` by the positions of the last layer and take the next "
    "whole number. The side after a stride is rounded up.",
)
def values(answer) -> None:
    """The smallest batch that gives each layer enough values."""
    for side, strides, least in (
        (32, [1, 2, 2, 2], 32),
        (224, [2, 2, 2, 2, 2], 98),
        (7, [2, 2], 17),
        (8, [1, 2, 1], 32),
        (4, [2, 2, 2], 5),
        (5, [2], 100),
    ):
        positions = side
        for stride in strides:
            positions = -(-positions // stride)
        wanted = -(-least // positions**2)
        got = answer(side, list(strides), least)
        whole = float(got) == int(got)
        assert whole, f"expected a whole number, got {got}"
        says("batch", got, wanted, f"{side=}, {strides=}, {least=}")


@exercise(
    "ch6-ghost",
    "Reshape x to (parts, size, C) and take mean and variance over axis 1; "
    "the rows of a part stand one behind the other.",
    "For the running statistics go through the parts in order: running = "
    "(1 - momentum) * running + momentum * new, the variance times "
    "size / (size - 1). Normalize by the variance without that factor.",
)
def ghost(answer) -> None:
    """Ghost batch norm and its running statistics, after one call."""
    rng = numpy.random.default_rng(0)
    for n, size, momentum in ((12, 4, 0.1), (6, 6, 0.5), (8, 2, 0.01)):
        x = rng.normal(2.0, [1.0, 3.0, 0.5], size=(n, 3))
        x += numpy.arange(n)[:, None]
        names = "output", "running mean", "running variance"
        got = unpacked(answer(x.copy(), size, momentum), *names)
        parts = numpy.split(x, n // size)
        y = [(p - p.mean(0)) / numpy.sqrt(p.var(0) + 1e-5) for p in parts]
        mean, var = numpy.zeros(3), numpy.ones(3)
        for part in parts:
            mean = mean + momentum * (part.mean(0) - mean)
            var = var + momentum * (part.var(0, ddof=1) - var)
        where = f"{n} rows, {size=}, {momentum=}"
        says("output", array(got[0], (n, 3)), numpy.concatenate(y), where)
        says("running mean", array(got[1], (3,)), mean, where)
        says("running variance", array(got[2], (3,)), var, where)


@exercise(
    "ch6-leak",
    "x.cumsum(1) divided by the number of steps so far is the mean up to "
    "each step.",
    "The variance up to step t is the mean of x**2 up to t less the square "
    "of the mean up to t, or a loop over t with x[:, : t + 1].",
)
def leak(answer) -> None:
    """A norm over the past of each sequence and channel."""
    rng = numpy.random.default_rng(1)
    x = rng.normal(1.0, 2.0, size=(3, 6, 2))
    got = array(answer(x.copy()), x.shape)
    later = x.copy()
    later[:, 4:] += 5.0
    again = array(answer(later), x.shape)
    for t in range(4):
        same = numpy.allclose(again[:, t], got[:, t], atol=1e-9)
        assert same, f"the output at step {t} moves with the input at step 4"
    for t in range(6):
        past = x[:, : t + 1]
        wanted = (x[:, t] - past.mean(1)) / numpy.sqrt(past.var(1) + 1e-5)
        says("output", got[:, t], wanted, f"step {t}")


@exercise(
    "ch6-influence",
    "numpy.outer(xhat, xhat) has all the products. The part without delta is "
    "the same for i = j and i != j.",
    "r is one over the biased standard deviation. The share is 1 less the "
    "diagonal's squares over all squares.",
)
def influence(answer) -> None:
    """The Jacobian of a normalized column, and the mates' share of it."""
    pair = isinstance(answer, tuple) and len(answer) == 2
    assert pair, "expected the pair (influence, share)"
    rng = numpy.random.default_rng(2)
    for m in (3, 8, 20):
        x = rng.normal(4.0, 3.0, size=m)
        where = f"{m=}"
        got = array(answer[0](x.copy()), (m, m))
        h = 1e-5
        wanted = numpy.stack(
            [_slope(x, h * unit) / h for unit in numpy.eye(m)], axis=1
        )
        says("influence", got, wanted, where)
        part = 1 - (numpy.diag(wanted) ** 2).sum() / (wanted**2).sum()
        says("share", array(answer[1](x.copy()), ()), part, where)


def _slope(x, step):
    """Half the difference of the normalized columns at x ± step."""
    up, down = (((v - v.mean()) / v.std()) for v in (x + step, x - step))
    return (up - down) / 2
