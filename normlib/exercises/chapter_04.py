"""Checks of chapter 4: running averages, merging, dropout, folding."""

import copy

import numpy
import torch
from torch import nn

import normlib
from normlib.exercises import exercise
from normlib.exercises.compare import array, says, unpacked


@exercise(
    "ch4-debias",
    "Keep the average a as it is, by a = (1 - momentum) * a + momentum * "
    "value, and compute the corrected one from it anew after each batch.",
    "After t batches the start has the weight (1 - momentum)**t. Subtract "
    "what it contributes, then divide by the weight of everything else.",
)
def debias(answer) -> None:
    """The corrected running average after each batch."""
    rng = numpy.random.default_rng(0)
    for momentum, start in ((0.1, 0.0), (0.01, 1.0), (0.6, -3.0)):
        batches = rng.normal(5.0, 1.0, size=12)
        where = f"{momentum=}, {start=}"
        got = array(answer(batches.tolist(), momentum, start), (12,))
        says("after the first batch", got[0], batches[0], where)
        ages = numpy.arange(12)
        for t in range(1, 13):
            weights = (1 - momentum) ** ages[:t][::-1]
            wanted = numpy.average(batches[:t], weights=weights)
            says(f"after {t} batches", got[t - 1], wanted, where)


@exercise(
    "ch4-steps",
    "Keras' momentum is the weight of the past: each batch leaves that share "
    "of the start.",
    "Solve decay**t <= share for t, and take the next whole number: dividing "
    "by the logarithm of a number below 1 turns the inequality over.",
)
def steps(answer) -> None:
    """The least number of batches that leave at most a share of the start."""
    for decay in (0.5, 0.9, 0.99, 0.999):
        for share in (0.7, 0.37, 0.05, 0.001):
            wanted, left = 0, 1.0
            while left > share:
                wanted, left = wanted + 1, left * decay
            got = answer(decay, share)
            whole = float(got) == int(got)
            assert whole, f"expected a whole number, got {got} ({decay=})"
            says("batches", got, wanted, f"{decay=}, {share=}")


@exercise(
    "ch4-merge",
    "Keep count, mean and variance of all batches so far, and merge each new "
    "batch's three numbers into them.",
    "The new mean moves by the newcomers' share of the distance between the "
    "means; the variance gains share * (1 - share) * distance**2 beside the "
    "weighted mean of the two variances.",
)
def merge(answer) -> None:
    """Mean and biased variance over batches of any sizes, in one pass."""
    rng = numpy.random.default_rng(1)
    for sizes, center in (
        ((5, 5, 5), 0.0),
        ((8, 3, 1), 2.0),
        ((7, 9, 2), 1e6),
    ):
        parts = [
            center + i + rng.normal(0.0, [0.5, 2.0], size=(m, 2))
            for i, m in enumerate(sizes)
        ]
        values = numpy.concatenate(parts)
        got = answer(part.copy() for part in parts)
        got = unpacked(got, "mean", "variance")
        mean, var = (array(part, (2,)) for part in got)
        where = f"batches of {sizes}, mean about {center:g}"
        says("mean", mean - center, values.mean(0) - center, where)
        wanted = (values - center).var(0)
        says("variance", var, wanted, where)
        close = numpy.abs(var / wanted - 1).max() < 1e-8
        assert close, f"variance: fewer than eight digits are right ({where})"


@exercise(
    "ch4-dropout",
    "Given the example, z has a mean (that of evaluation) and a variance "
    "(of the dropout). The law of total variance adds the variance of the "
    "first to the mean of the second.",
    "The units drop out independently, so given x the variance of z is the "
    "sum of w**2 * x**2 * p / (1 - p). In evaluation the variance is that of "
    "x @ w, correlations between the units included.",
)
def dropout(answer) -> None:
    """By how much dropout raises the variance of a weighted sum."""
    rng = numpy.random.default_rng(2)
    for p in (0.5, 0.1, 0.8):
        mixed = rng.normal(size=(40, 4)) @ rng.normal(size=(4, 4))
        x = numpy.maximum(mixed + 0.5, 0)
        w = rng.normal(size=4)
        noise = p / (1 - p) * (x**2).mean(0) @ w**2
        wanted = 1 + noise / (x @ w).var()
        got = array(answer(x.copy(), w.copy(), p), ())
        says("factor", got, wanted, f"{p=}")


@exercise(
    "ch4-fold",
    "y = a * x + c for each output channel, with a = weight / sqrt("
    "running_var + eps) and c = bias - a * running_mean; a missing weight is "
    "1, a missing bias 0.",
    "Which axis of the layer's weight runs over the output channels? For a "
    "transposed convolution it is the second. And the old bias is scaled.",
)
def fold(answer) -> None:
    """A convolution, transposed or not, and a batch norm as one layer."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for kind in (nn.Conv2d, nn.ConvTranspose2d):
            for bias, affine, inward in ((True, True, 3), (False, False, 4)):
                _fold(answer, kind, bias, affine, inward)


def _fold(answer, kind, bias: bool, affine: bool, inward: int) -> None:
    layer = kind(inward, 4, 3, bias=bias).double()
    norm = _used(normlib.BatchNorm2d(4, eps=0.1, affine=affine))
    kept = copy.deepcopy(layer.state_dict())
    where = f"{kind.__name__}, {bias=}, {affine=}"
    got = unpacked(answer(layer, norm), "weight", "bias")
    for name, value in layer.state_dict().items():
        assert torch.equal(kept[name], value), (
            f"it changed the layer ({where})"
        )
    one = kind(inward, 4, 3).double()
    for name, value in zip(("weight", "bias"), got, strict=True):
        found = array(value, tuple(getattr(one, name).shape))
        setattr(one, name, nn.Parameter(torch.from_numpy(found)))
    x = torch.randn(2, inward, 5, 5, dtype=torch.float64)
    wanted = norm(layer(x)).detach()
    says("output", array(one(x), tuple(wanted.shape)), wanted, where)


def _used(norm: normlib.BatchNorm2d) -> normlib.BatchNorm2d:
    """In evaluation, with statistics and parameters that are not the first."""
    for name, tensor in norm.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            positive = name in ("running_var", "weight")
            values = torch.rand(tensor.shape) + 0.5 * positive
            tensor.data = values if positive else values - 0.5
    return norm.double().eval()


@exercise(
    "ch4-forgets",
    "A module saves, loads and moves its parameters and its buffers, and "
    "nothing else. register_buffer makes a buffer of a tensor.",
    "Update the buffers from detached values (or under no_grad): otherwise "
    "each average keeps the graph of all batches before. Normalize by the "
    "attached ones. And ask self.training which statistics count, not "
    "whether gradients are on.",
)
def forgets(answer) -> None:
    """A batch norm that saves its statistics, and lets go of its batches."""
    generator = torch.Generator().manual_seed(4)
    layer = answer(3)
    mean, var = torch.zeros(3), torch.ones(3)
    for step in range(4):
        x = 2 * torch.randn(6, 3, generator=generator) + 5
        x.requires_grad_()  # as behind a trained layer
        y = layer(x)
        wanted = nn.functional.batch_norm(x, None, None, training=True)
        says("output in training", array(y, (6, 3)), wanted, f"call {step}")
        if step == 0:
            _same_gradient(x, y, wanted)
        x = x.detach()
        mean = 0.9 * mean + 0.1 * x.mean(0)
        var = 0.9 * var + 0.1 * x.var(0, correction=0)
    keys = set(layer.state_dict())
    for name, right in (("running_mean", mean), ("running_var", var)):
        assert hasattr(layer, name), f"it has no {name}"
        got = getattr(layer, name)
        says(name, array(got, (3,)), right, "after 4 training calls")
        assert name in keys, f"{name} is not in the state_dict: {sorted(keys)}"
        assert not got.requires_grad, f"{name} keeps the graph of its batches"
    fresh = answer(3)
    fresh.load_state_dict(layer.state_dict())
    fresh = fresh.double().eval()
    one = torch.tensor([[4.0, -2.0, 30.0]], dtype=torch.float64)
    wanted = (one - mean) / torch.sqrt(var + 1e-5)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            out = fresh(one)
        got = array(fresh.running_mean, (3,))
        says("running_mean", got, mean, "evaluation must not move it")
        where = f"loaded, made float64, gradients {'on' if grad else 'off'}"
        says("output in evaluation", array(out, (1, 3)), wanted, where)
    with torch.no_grad():
        x = torch.randn(6, 3, generator=generator)
        y = layer.train()(x)
    wanted = nn.functional.batch_norm(x, None, None, training=True)
    says("output in training", array(y, (6, 3)), wanted, "gradients off")


def _same_gradient(x, y, wanted) -> None:
    """What reaches x through y is what reaches it through wanted."""
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape) ** 2
    assert y.requires_grad, "no gradient passes the layer in training"
    (got,) = torch.autograd.grad((weights * y).sum(), x, retain_graph=True)
    (right,) = torch.autograd.grad((weights * wanted).sum(), x)
    where = "through the batch's own mean and variance"
    says("gradient in training", array(got, (6, 3)), right, where)
