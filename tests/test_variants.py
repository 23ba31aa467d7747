"""The variants against formulas in NumPy, and the norms that they become."""

import copy
import io
import math
import pickle
from contextlib import nullcontext
from functools import partial

import numpy
import pytest
import torch
from devices import over_devices
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrizations, parametrize

import normlib
from normlib import axes, functional, variants
from normlib.testing import assert_close

SHAPES = {
    "dense": (6, 3),
    "sequence": (4, 3, 5),
    "image": (5, 3, 4, 2),
    "one instance": (1, 3, 4, 2),
    "volume": (2, 3, 2, 1, 3),
}
BATCH_NORMS = {
    "noisy": variants.NoisyBatchNorm,
    "ghost": partial(variants.GhostBatchNorm, virtual_batch_size=2),
    "L1": partial(variants.LpBatchNorm, p=1),
    "L2": partial(variants.LpBatchNorm, p=2),
    "Linf": partial(variants.LpBatchNorm, p=math.inf),
    "L1 before": partial(variants.LpBatchNorm, p=1, before_shift=True),
    "renorm": partial(variants.BatchRenorm, r_max=1.2, d_max=0.3),
}
CONFIGS = {
    "defaults": {},
    "eps": {"eps": 0.3},
    "cumulative": {"momentum": None},
    "no affine": {"affine": False},
    "no bias": {"bias": False},
    "no running statistics": {"track_running_stats": False},
    "bare": {"affine": False, "track_running_stats": False},
}
# What is BatchNorm itself, and not only in evaluation.
PLAIN = {
    "noise of no size": partial(
        variants.NoisyBatchNorm, n_mu=0, n_sigma=1, r_mu=0, r_sigma=0
    ),
    "one ghost batch": variants.GhostBatchNorm,
    "p = 2": partial(variants.LpBatchNorm, p=2),
    "r = 1, d = 0": variants.BatchRenorm,
}


def table(cases):
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request):
    return request.param


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


def draw(shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g).double() * 2 + 1).to(dtype)


def make(case, channels=3, **kwargs):
    """A layer in float64 with a state unlike the initial one."""
    module = case(channels, **({"dtype": torch.float64} | kwargs))
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(torch.linspace(-1.5, 2.0 + i, p.numel()).reshape(p.shape))
        if module.running_mean is not None:
            module.running_mean.copy_(torch.linspace(0.8, 1.5, channels))
            module.running_var.copy_(torch.linspace(3.0, 5.0, channels))
    return module


def outcome(module, x, dy, seed=0):
    """Everything that a step makes, with the same noise for each seed."""
    torch.manual_seed(seed)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(dy)
    return [y, x.grad, *(p.grad for p in module.parameters())] + [
        b.clone().to(y.dtype) for b in module.buffers()
    ]


def by_channel(x):
    """Axes over which a channel's statistics run, and how they broadcast."""
    return (0, *range(2, x.ndim)), (1, -1) + (1,) * (x.ndim - 2)


def affine(module, xhat):
    _, beside = by_channel(xhat)
    for p, apply in (
        (module.weight, numpy.multiply),
        (module.bias, numpy.add),
    ):
        if p is not None:
            xhat = apply(xhat, p.detach().numpy().reshape(beside))
    return xhat


def batch_norm(module, x):
    over, _ = by_channel(x)
    mean, var = x.mean(over, keepdims=True), x.var(over, keepdims=True)
    return affine(module, (x - mean) / numpy.sqrt(var + module.eps))


SCALES = {
    1: lambda x, over: numpy.abs(x).mean(over, keepdims=True),
    2: lambda x, over: numpy.sqrt((x**2).mean(over, keepdims=True)),
    math.inf: lambda x, over: numpy.abs(x).max(over, keepdims=True),
}


def lp_batch_norm(module, x):
    over, _ = by_channel(x)
    centered = x - x.mean(over, keepdims=True)
    scale = SCALES[module.p](x if module.before_shift else centered, over)
    return affine(module, centered / numpy.sqrt(scale**2 + module.eps))


# What all the batch norms share.


@table(PLAIN)
def test_at_its_limit_it_is_batch_norm(case, shape, config):
    theirs = make(normlib.BatchNorm, **config)
    ours = make(case, **config)
    for step in range(3):
        x, dy = draw(shape, step), draw(shape, 10 + step)
        assert_close(outcome(ours, x, dy), outcome(theirs, x, dy))
    ours.eval()
    theirs.eval()
    assert_close(outcome(ours, x, dy), outcome(theirs, x, dy))


@table(BATCH_NORMS)
def test_keys_and_evaluation_are_batch_norms(case, shape):
    theirs = make(normlib.BatchNorm).eval()
    ours = case(3, dtype=torch.float64).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, dy = draw(shape), draw(shape, 1)
    assert_close(outcome(ours, x, dy), outcome(theirs, x, dy))
    ours.train()(draw((6, 3)))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    nn.BatchNorm1d(3).load_state_dict(ours.state_dict(), strict=True)
    assert_close(theirs(x), ours.eval()(x))


@table(BATCH_NORMS)
def test_without_running_statistics_evaluation_uses_the_whole_batch(case):
    ours = make(case, track_running_stats=False).eval()
    x = draw((5, 3, 4))
    if isinstance(ours, variants.LpBatchNorm):
        assert_close(ours(x), lp_batch_norm(ours, x.numpy()))
    else:
        assert_close(ours(x), batch_norm(ours, x.numpy()))


@table(BATCH_NORMS)
def test_tracking_switched_off_after_construction(case):
    never, ours = make(case, track_running_stats=False), make(case)
    before = copy.deepcopy(ours.state_dict())
    ours.track_running_stats = False
    x = draw((4, 3, 5))
    count = 2 + len(list(ours.parameters()))
    assert_close(outcome(ours, x, x)[:count], outcome(never, x, x)[:count])
    for key, value in ours.state_dict().items():
        assert torch.equal(value, before[key]), key


@table(BATCH_NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_gradients(case, training):
    module = make(case).train(training)

    def step(x, weight, bias):
        torch.manual_seed(0)
        state = {k: b.clone() for k, b in module.named_buffers()}
        state |= {"weight": weight, "bias": bias}
        return torch.func.functional_call(module, state, (x,))

    inputs = [draw((4, 3, 2)), *(p.detach() for p in module.parameters())]
    inputs = [p.clone().requires_grad_() for p in inputs]
    if isinstance(module, variants.BatchRenorm) and training:
        # Numerical differences see r and d move; see the test below.
        inputs[0].requires_grad_(False)
    with normlib.use_backend("eager"):
        assert gradcheck(step, inputs)
        assert gradgradcheck(step, inputs, atol=1e-4)


@table(BATCH_NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_computed_in_thirty_two(case, dtype):
    x = draw((6, 3, 4), dtype=dtype)
    narrow = make(case, dtype=torch.float32)
    wide = make(case, dtype=torch.float32)
    y, expected = (
        outcome(m, x.to(d), x.to(d), 5)[0]
        for m, d in ((narrow, dtype), (wide, torch.float32))
    )
    assert y.dtype == dtype
    assert_close(y, expected.to(dtype))
    assert_close(list(narrow.buffers()), list(wide.buffers()))


@pytest.mark.parametrize("name", ["L1", "L2", "Linf", "renorm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_layer_of_sixteen_bits_is_rounded_once(name, dtype):
    narrow = make(BATCH_NORMS[name], dtype=dtype)
    wide = copy.deepcopy(narrow).float()
    x = draw((6, 3, 4), dtype=dtype)
    assert torch.equal(narrow(x), wide(x.float()).to(dtype))


@table(BATCH_NORMS)
def test_channels_last_stays(case):
    x = draw((4, 3, 5, 2)).to(memory_format=torch.channels_last)
    a, b = (outcome(make(case), v, x) for v in (x, x.contiguous()))
    assert_close(a, b)
    for t in a[:2]:
        assert t.is_contiguous(memory_format=torch.channels_last)


@table(BATCH_NORMS)
def test_features_last_by_a_transpose(case):
    """(N, L, D) as (N, D, L): a view, whose values are all that matters."""
    tokens = draw((4, 5, 3))
    torch.manual_seed(0)
    y = make(case)(tokens.transpose(1, 2))
    torch.manual_seed(0)
    assert_close(y, make(case)(tokens.transpose(1, 2).contiguous()))
    assert y.is_contiguous()  # as torch.nn's


@table(BATCH_NORMS)
@pytest.mark.parametrize("config", [{}, {"momentum": None}])
def test_a_refused_call_leaves_every_buffer_as_it_was(case, config):
    module = make(case, **config)
    before = copy.deepcopy(module.state_dict())
    refused = [
        (torch.ones(3), ValueError, r"at least 2D input.*\(3,\)"),
        (draw((4, 5)), RuntimeError, "5 elements not 3"),
        (draw((1, 3)), ValueError, r"more than 1 value.*\(1, 3\)"),
        (draw((4, 3)).float(), RuntimeError, "float32.*float64"),
        (draw((4, 3)).long(), NotImplementedError, "int64"),
    ]
    for x, error, message in refused:
        with pytest.raises(error, match=message):
            module(x)
        for key, value in module.state_dict().items():
            assert torch.equal(value, before[key]), key


@table(BATCH_NORMS)
@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 3, 0)])
def test_an_empty_batch_moves_nothing(case, shape):
    module = make(case)
    mean = module.running_mean.clone()
    assert module(torch.empty(shape).double()).shape == shape
    assert torch.equal(module.running_mean, mean)


@table(BATCH_NORMS)
def test_pickled_copied_and_saved(case):
    ours = make(case)
    x = draw((4, 3, 5))
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    copies = [
        pickle.loads(pickle.dumps(ours)),
        copy.deepcopy(ours),
        torch.load(file, weights_only=False),
    ]
    expected = outcome(ours, x, x)
    for module in copies:
        assert repr(module) == repr(ours)
        assert_close(outcome(module, x, x), expected)


@table(BATCH_NORMS)
@over_devices
def test_device_and_dtype_are_taken_from_the_constructor(case, device):
    module = case(3, device=device, dtype=torch.float64)
    y = module(draw((6, 3)).to(device))
    assert {t.dtype for t in (*module.parameters(), y)} == {torch.float64}
    assert {t.device.type for t in (*module.buffers(), y)} == {device}


def learns(first, norm):
    """Whether a network of two layers does, with each of three seeds."""
    falls = []
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(64, 10)
        target = torch.sin(x @ torch.randn(10, 1))
        net = nn.Sequential(
            first(nn.Linear(10, 32)), norm(32), nn.ReLU(), nn.Linear(32, 1)
        )
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        losses = []
        for _ in range(100):
            optimizer.zero_grad()
            loss = (net(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        falls.append(numpy.mean(losses[-20:]) < 0.85 * numpy.mean(losses[:5]))
    return all(falls)


@table(BATCH_NORMS | {"DyT": variants.DyT})
def test_a_network_of_two_layers_learns(case):
    assert learns(nn.Identity(), case)


@table(BATCH_NORMS | {"DyT": variants.DyT})
@pytest.mark.parametrize("training", [True, False])
def test_compiled_without_a_graph_break(case, training):
    ours, theirs = (case(3).train(training) for _ in range(2))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for seed, shape in enumerate([(4, 3), (4, 3), (4, 3), (8, 3)]):
        x, dy = (draw(shape, s, torch.float32) for s in (seed, 9))
        assert_close(
            outcome(compiled, x, dy, seed), outcome(theirs, x, dy, seed)
        )


def test_repr_shows_what_is_the_variants_own():
    ends = {
        "noisy": "n_mu=0.5, n_sigma=1.25, r_mu=0.1, r_sigma=0.1)",
        "ghost": "virtual_batch_size=2)",
        "Linf": "p=inf, before_shift=False)",
        "renorm": "r_max=1.2, d_max=0.3)",
    }
    for name, end in ends.items():
        text = repr(BATCH_NORMS[name](3))
        assert text.endswith("track_running_stats=True, " + end)
        assert text.split("(")[0] == type(BATCH_NORMS[name](3)).__name__


@pytest.mark.parametrize(
    ("case", "kwargs", "message"),
    [
        (variants.NoisyBatchNorm, {"n_sigma": 0.5}, "n_sigma=0.5"),
        (variants.NoisyBatchNorm, {"r_mu": -1}, "r_mu=-1"),
        (variants.GhostBatchNorm, {"virtual_batch_size": 0}, "got 0"),
        (variants.LpBatchNorm, {"p": 3}, "1, 2 or infinity, but got 3"),
        (variants.BatchRenorm, {"r_max": 0.9}, "r_max=0.9"),
        (variants.BatchRenorm, {"d_max": -1}, "d_max=-1"),
        (variants.BatchRenorm, {"r_max": math.nan}, "r_max=nan"),
    ],
)
def test_wrong_arguments_are_named(case, kwargs, message):
    with pytest.raises(ValueError, match=message):
        case(3, **kwargs)


# Noise.


def noise_by_hand(x, seed, n_mu, n_sigma, r_mu, r_sigma):
    """The recipe of Santurkar et al., drawn in the order of the paper."""
    g = torch.Generator().manual_seed(seed)
    n, c = x.shape[:2]

    def uniform(*size):
        return torch.rand(size, generator=g, dtype=torch.float64).numpy()

    mu = (2 * uniform(c) - 1) * n_mu
    sigma = 1 + uniform(c) * (n_sigma - 1)
    m = mu - r_mu + 2 * r_mu * uniform(n, c)
    s = torch.randn(n, c, generator=g, dtype=torch.float64).numpy()
    s = sigma + r_sigma * s
    spread = (n, c) + (1,) * (x.ndim - 2)
    return x * s.reshape(spread) + m.reshape(spread)


def test_noisy_batch_norm_is_the_papers_recipe(shape):
    g = torch.Generator().manual_seed(7)
    module = make(variants.NoisyBatchNorm, generator=g)
    x = draw(shape)
    y = batch_norm(module, x.numpy())
    assert_close(module(x), noise_by_hand(y, 7, 0.5, 1.25, 0.1, 0.1))
    other = make(
        variants.NoisyBatchNorm, n_mu=2, n_sigma=3, r_mu=0.5, r_sigma=0.7
    )
    other.generator = torch.Generator().manual_seed(8)
    assert_close(other(x), noise_by_hand(y, 8, 2, 3, 0.5, 0.7))


def test_the_noise_is_drawn_anew_at_each_step_and_shared_by_positions():
    torch.manual_seed(0)
    x = torch.zeros(2000, 3, 4)
    steps = torch.stack([variants.perturb(x) for _ in range(20)])
    assert_close(steps, steps[..., :1].expand_as(steps), tolerance=0)
    shifts = steps[..., 0]
    means = shifts.mean(1)  # of each step and channel
    assert means.std(0).min() > 0.2  # uniform in ±0.5: 0.29
    assert means.abs().max() < 0.51
    spread = shifts.sub(means[:, None]).abs()
    assert 0.099 < spread.max() < 0.11  # within a step: ±0.1


def test_the_noise_has_the_stated_moments():
    torch.manual_seed(0)
    ones, zeros = torch.ones(200, 500), torch.zeros(200, 500)
    scale = torch.cat([variants.perturb(ones, n_mu=0, r_mu=0)] * 1)
    assert abs(scale.mean() - 1.125) < 0.02  # (1 + n_sigma) / 2
    assert abs(scale.std(0).mean() - 0.1) < 0.005  # within a channel
    assert scale.mean(0).min() > 0.95
    assert scale.mean(0).max() < 1.3
    shift = variants.perturb(zeros)
    assert abs(shift.mean(0).std() - 0.5 / 3**0.5) < 0.03


def test_the_noise_follows_its_generator_and_stops_in_evaluation():
    def run(module):
        return [module(x), module(x)]

    x = draw((6, 3))
    layers = [
        make(
            variants.NoisyBatchNorm,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    ]
    clone = copy.deepcopy(layers[0])
    first, again, other = map(run, layers)
    assert_close(first, again, tolerance=0)
    assert_close(run(clone), first, tolerance=0)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    assert_close(*run(layers[0].eval()), tolerance=0)


def test_bounds_that_turn_bad_are_refused_before_anything_moves():
    noisy, renorm = (
        make(case) for case in (variants.NoisyBatchNorm, variants.BatchRenorm)
    )
    noisy.n_sigma = 0.5
    renorm.r_max = 0.0
    for module in (noisy, renorm):
        with pytest.raises(ValueError, match=r"n_sigma=0\.5|r_max=0\.0"):
            module(draw((6, 3)))
        assert module.num_batches_tracked == 0
    with pytest.raises(ValueError, match="r_sigma=-2"):
        variants.perturb(draw((6, 3)), r_sigma=-2)


# Ghost batches.


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("n", "size", "cuts"),
    [(6, 2, (2, 4)), (7, 3, (3, 5)), (5, 4, (3,)), (4, 9, ())],
)
def test_each_ghost_batch_is_normalized_by_itself(n, size, cuts, momentum):
    module = make(
        variants.GhostBatchNorm, virtual_batch_size=size, momentum=momentum
    )
    mean, var = module.running_mean.numpy().copy(), None
    var = module.running_var.numpy().copy()
    x = draw((n, 3, 4))
    y = module(x)
    parts = numpy.split(x.numpy(), cuts)
    assert_close(y, numpy.concatenate([batch_norm(module, p) for p in parts]))
    for t, part in enumerate(parts):
        share = 1 / (t + 1) if momentum is None else momentum
        mean = (1 - share) * mean + share * part.mean((0, 2))
        new = part.var((0, 2), ddof=1)
        var = (1 - share) * var + share * new
    assert_close([module.running_mean, module.running_var], [mean, var])
    assert module.num_batches_tracked == len(parts)


def test_the_running_mean_is_the_weighted_sum_of_the_paper():
    """``(1 - η)^k mu + Σ η (1 - η)^(k - i) mu_i`` for k ghost batches."""
    module = make(variants.GhostBatchNorm, virtual_batch_size=2)
    x, start = draw((8, 3)), module.running_mean.clone()
    module(x)
    means = x.reshape(4, 2, 3).mean(1)
    weights = 0.1 * 0.9 ** torch.arange(3, -1, -1, dtype=torch.float64)
    assert_close(module.running_mean, 0.9**4 * start + weights @ means)


def test_ghost_batch_norm_is_instance_norm_of_the_ghost_batches():
    """One view more: a ghost batch is an instance, its members positions."""
    module = make(variants.GhostBatchNorm, virtual_batch_size=2)
    x = draw((6, 3, 5))
    ghosts = x.reshape(3, 2, 3, 5).transpose(1, 2)
    view = axes.View(3, 3, 1, 2 * 5)
    y, _, _ = functional.normalize(ghosts, view, module.weight, module.bias)
    assert_close(module(x), y.transpose(1, 2).reshape(x.shape))


def test_large_ghost_batches_go_through_the_fast_kernels():
    """Twice before the backward, as where two images share a network."""
    x, dy = (draw((10, 16, 32, 32), s, torch.float32) for s in (0, 1))
    results = []
    for backend in (nullcontext(), normlib.use_backend("eager")):
        module = make(
            variants.GhostBatchNorm,
            16,
            virtual_batch_size=4,
            dtype=torch.float32,
        )
        with backend:
            earlier = module(x.flip(0))
            results.append(outcome(module, x, dy))
            module.zero_grad()
            earlier.backward(dy)
            results[-1] += [p.grad for p in module.parameters()]
    assert_close(*results)


@pytest.mark.parametrize(("n", "size"), [(6, 1), (3, 2), (1, 4)])
def test_a_ghost_batch_of_one_value_is_refused(n, size):
    module = make(variants.GhostBatchNorm, virtual_batch_size=size)
    before = copy.deepcopy(module.state_dict())
    message = rf"\(1, 3\) from input size \({n}, 3\).*size={size}"
    with pytest.raises(ValueError, match=message):
        module(draw((n, 3)))
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])
    assert module(draw((n, 3, 2))).shape == (n, 3, 2)
    assert module.eval()(draw((n, 3))).shape == (n, 3)  # nothing is cut


# Lp.


@pytest.mark.parametrize("p", SCALES)
@pytest.mark.parametrize("before_shift", [False, True])
def test_lp_batch_norm_divides_by_the_lp_norm(p, before_shift, shape, config):
    module = make(
        variants.LpBatchNorm, p=p, before_shift=before_shift, **config
    )
    x = draw(shape).numpy()
    over, _ = by_channel(x)
    old = module.running_mean, module.running_var
    old = [None if r is None else r.numpy().copy() for r in old]
    expected = lp_batch_norm(module, x)
    assert_close(module(torch.from_numpy(x)), expected)
    if old[0] is not None:
        n = x.size // 3
        mean = x.mean(over, keepdims=True)
        scale = SCALES[p](x if before_shift else x - mean, over)
        share = 1.0 if module.momentum is None else 0.1
        square = scale.ravel() ** 2 * n / (n - 1)
        new = [
            (1 - share) * r + share * now
            for r, now in zip(old, (mean.ravel(), square), strict=True)
        ]
        assert_close([module.running_mean, module.running_var], new)
        assert module.num_batches_tracked == 1


@pytest.mark.parametrize("p", SCALES)
def test_the_output_has_the_lp_norm_one(p):
    module = variants.LpBatchNorm(3, p=p, eps=1e-30, dtype=torch.float64)
    x = draw((50, 3)) * torch.tensor([1e-2, 1.0, 1e3], dtype=torch.float64)
    y = module(x).detach().numpy()
    assert_close(SCALES[p](y, 0), numpy.ones((1, 3)))
    assert_close(y.mean(0), numpy.zeros(3))


def test_the_mean_absolute_deviation_of_normal_values():
    x = torch.randn(
        400_000, 1, generator=torch.Generator().manual_seed(0)
    ).double()
    module = variants.LpBatchNorm(1, momentum=1.0, dtype=torch.float64)
    y = module(x)
    assert abs(module.running_var.sqrt().item() - 0.798) < 0.002
    assert abs(y.std().item() - math.sqrt(math.pi / 2)) < 0.005


@pytest.mark.parametrize("p", SCALES)
def test_a_constant_channel_gives_the_bias_and_a_finite_gradient(p):
    module = make(partial(variants.LpBatchNorm, p=p))
    x = torch.full((4, 3), 2.5, dtype=torch.float64, requires_grad=True)
    y = module(x)
    y.square().sum().backward()
    assert_close(y, module.bias.expand(4, 3))
    assert x.grad.isfinite().all()


# Renormalization.


def renorm(module, x, mean, var):
    """Ioffe's algorithm 1, with the standard deviations of BatchNorm."""
    over, beside = by_channel(x)
    mean, var = (r.detach().numpy().reshape(beside) for r in (mean, var))
    mean_b = x.mean(over, keepdims=True)
    sigma_b = numpy.sqrt(x.var(over, keepdims=True) + module.eps)
    sigma = numpy.sqrt(var + module.eps)
    r = numpy.clip(sigma_b / sigma, 1 / module.r_max, module.r_max)
    d = numpy.clip((mean_b - mean) / sigma, -module.d_max, module.d_max)
    return affine(module, (x - mean_b) / sigma_b * r + d), r, d


@pytest.mark.parametrize("limits", [(1.2, 0.3), (3.0, 5.0), (1.0, 0.1)])
def test_batch_renorm_is_the_papers_algorithm(limits, shape, config):
    r_max, d_max = limits
    if not config.get("track_running_stats", True):
        config = config | {"track_running_stats": True, "eps": 1e-3}
    module = make(variants.BatchRenorm, r_max=r_max, d_max=d_max, **config)
    for step in range(3):
        x = draw(shape, step)
        mean, var = module.running_mean.clone(), module.running_var.clone()
        expected, r, d = renorm(module, x.numpy(), mean, var)
        assert_close(module(x), expected)
        assert (r != 1).any() or r_max == 1
        assert (d != 0).all()
    theirs = make(normlib.BatchNorm, **config)
    for step in range(3):
        theirs(draw(shape, step))
    assert_close(list(module.buffers()), list(theirs.buffers()))


def test_the_corrections_are_constants_to_the_gradient():
    """dx is that of a batch norm with weight r*w and bias d*w + b."""
    module = make(variants.BatchRenorm, r_max=1.2, d_max=0.3)
    x, dy = draw((6, 3, 4)), draw((6, 3, 4), 1)
    _, r, d = renorm(
        module, x.numpy(), module.running_mean, module.running_var
    )
    assert not numpy.allclose(r, 1)
    r, d = (torch.from_numpy(p).reshape(3) for p in (r, d))
    w, b = (p.detach().clone().requires_grad_() for p in module.parameters())

    def constant(x, w, b):
        return nn.functional.batch_norm(x, None, None, r * w, d * w + b, True)

    leaf = x.clone().requires_grad_()
    constant(leaf, w, b).backward(dy)
    _, *gradients = outcome(module, x, dy)[:4]
    assert_close(gradients, [leaf.grad, w.grad, b.grad])


def test_without_limits_training_is_evaluation_by_the_old_statistics():
    module = make(variants.BatchRenorm, r_max=math.inf, d_max=math.inf)
    x = draw((6, 3, 4))
    expected = module.eval()(x)
    assert_close(module.train()(x), expected)
    assert module.num_batches_tracked == 1
    assert not numpy.allclose(module.eval()(x).detach(), expected.detach())


def test_the_limits_are_attributes_to_schedule():
    module = make(variants.BatchRenorm, momentum=0.0)
    x = draw((6, 3))
    outputs = []
    for r_max, d_max in [(1.0, 0.0), (1.1, 0.2), (3.0, 5.0)]:
        module.r_max, module.d_max = r_max, d_max
        outputs.append(module(x))
        expected = renorm(
            module, x.numpy(), module.running_mean, module.running_var
        )[0]
        assert_close(outputs[-1], expected)
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_without_running_statistics_renorm_is_batch_norm():
    theirs = make(normlib.BatchNorm, track_running_stats=False)
    ours = make(BATCH_NORMS["renorm"], track_running_stats=False)
    x = draw((6, 3))
    assert_close(outcome(ours, x, x), outcome(theirs, x, x))
    taken = make(BATCH_NORMS["renorm"])
    taken.running_mean = taken.running_var = None
    assert_close(taken(x), theirs(x))


# Adaptive instance norm.


def adain(content, style, eps=1e-5):
    def parts(x):
        over = tuple(range(2, x.ndim))
        mean, var = x.mean(over), x.var(over)
        spread = x.shape[:2] + (1,) * (content.ndim - 2)
        return mean.reshape(spread), numpy.sqrt(var + eps).reshape(spread)

    (mean, sigma), (mean_s, sigma_s) = parts(content), parts(style)
    return (content - mean) / sigma * sigma_s + mean_s


@pytest.mark.parametrize(
    ("content", "style"),
    [
        ((2, 3, 4, 5), (2, 3, 4, 5)),
        ((2, 3, 4, 5), (1, 3, 2, 7)),
        ((2, 3, 6), (2, 3, 4, 5)),
        ((1, 3, 2), (1, 3, 1)),
        ((2, 3, 4, 5), (2, 3)),
    ],
)
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_adain_gives_the_contents_shape_the_styles_statistics(
    content, style, eps
):
    x, s = draw(content), draw(style, 1) * 3 - 4
    y = variants.AdaIN(eps)(x, s)
    assert_close(y, adain(x.numpy(), s.numpy(), eps))
    inputs = [x.requires_grad_(), s.requires_grad_()]
    assert gradcheck(partial(variants.adaptive_instance_norm, eps=eps), inputs)
    assert gradgradcheck(variants.AdaIN(eps), inputs, atol=1e-4)


def test_by_its_own_statistics_an_image_does_not_change():
    x = draw((2, 3, 4, 5))
    for own in (x, x.flip(-1), x.repeat(1, 1, 2, 1)):
        assert_close(variants.AdaIN(0.3)(x, own), x)


def test_by_a_standard_style_adain_is_instance_norm():
    x = draw((2, 3, 4, 5))
    style = torch.tensor([-1.0, 1.0]).double().expand(1, 3, 2)
    expected = nn.functional.instance_norm(x, eps=1e-12)
    assert_close(variants.AdaIN(1e-12)(x, style), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adain_of_sixteen_bits_is_rounded_once(dtype):
    x, s = draw((2, 3, 4, 5), 0, dtype), draw((1, 3, 6), 1, dtype)
    y = variants.AdaIN()(x, s)
    assert torch.equal(y, variants.AdaIN()(x.float(), s.float()).to(dtype))


def test_adain_keeps_channels_last_and_compiles():
    ours = variants.AdaIN()
    x, s = draw((2, 3, 4, 5)), draw((1, 3, 6), 1)
    y = ours(x.to(memory_format=torch.channels_last), s)
    assert_close(y, ours(x, s))
    assert y.is_contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, s), y)
    assert repr(pickle.loads(pickle.dumps(ours))) == "AdaIN(eps=1e-05)"


def test_a_sequence_is_restyled_over_its_tokens():
    tokens, style = draw((4, 5, 3)), draw((1, 9, 3), 1)
    y = variants.AdaIN()(tokens.transpose(1, 2), style.transpose(1, 2))
    mean, var = y.mean(2), y.var(2, correction=0)
    assert_close(mean, style.mean(1).expand(4, 3))
    assert_close(var, style.var(1, correction=0).expand(4, 3), tolerance=1e-4)


@pytest.mark.parametrize(
    ("content", "style", "message"),
    [
        ((3,), (1, 3, 2), r"\(N, C, ...\).*shape \(3,\)"),
        ((2, 3, 4), (3,), r"style of shape \(3,\)"),
        ((2, 3, 4), (2, 5, 4), r"\(2, 3, 4\).*\(2, 5, 4\)"),
        ((4, 3, 4), (2, 3, 4), r"\(1, C, ...\).*\(4, 3, 4\).*\(2, 3, 4\)"),
        ((2, 3), (2, 3, 4), r"more than 1 position.*\(2, 3\)"),
        ((2, 3, 1), (2, 3, 4), r"more than 1 position.*\(2, 3, 1\)"),
        ((2, 3, 4), (2, 3, 0), r"at least 1 of style.*\(2, 3, 0\)"),
    ],
)
def test_adain_refuses_shapes_that_do_not_match(content, style, message):
    with pytest.raises(ValueError, match=message):
        variants.AdaIN()(torch.ones(content), torch.ones(style))


def test_adain_refuses_other_bad_input():
    x = draw((2, 3, 4))
    with pytest.raises(ValueError, match=r"one dtype.*float64.*float32"):
        variants.AdaIN()(x, x.float())
    with pytest.raises(NotImplementedError, match="int64"):
        variants.AdaIN()(x.long(), x.long())
    with pytest.raises(ValueError, match="-1"):
        variants.AdaIN(-1.0)(x, x)


# Weights.

LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "one output": (lambda: nn.Linear(4, 1), (5, 4)),
    "one input": (lambda: nn.Linear(1, 3), (5, 1)),
    "signal": (lambda: nn.Conv1d(2, 3, 3), (4, 2, 6)),
    "image": (lambda: nn.Conv2d(2, 4, (3, 2)), (2, 2, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(2, 3, 3), (4, 2, 6)),
}


def layer(make, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return make().to(dtype)


def learned(module, x, dy):
    """The weight, the output and every gradient."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(dy)
    return [module.weight, y, x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("dim", [0, 1, None, -1, -2])
@table(LAYERS)
def test_weight_norm_is_torchs(case, dim):
    make, shape = case
    ours, theirs = (
        norm(layer(make), dim=dim)
        for norm in (variants.weight_norm, parametrizations.weight_norm)
    )
    assert_close(ours.weight, layer(make).weight)  # as it was
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert_close(list(ours.state_dict().values()), list(state.values()))
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = draw(shape)
    dy = draw(theirs(x).shape, 1)
    assert_close(learned(ours, x, dy), learned(theirs, x, dy))
    fresh = parametrizations.weight_norm(layer(make, 1), dim=dim)
    fresh.load_state_dict(ours.state_dict(), strict=True)
    assert_close(fresh(x), ours(x))


def test_weight_norm_is_the_papers_formula():
    module = variants.weight_norm(layer(lambda: nn.Linear(4, 3)))
    g, v = (p for p in module.parametrizations.weight.parameters())
    with torch.no_grad():
        g.mul_(-1.7)
        v.mul_(3)
    norm = numpy.linalg.norm(v.detach().numpy(), axis=1, keepdims=True)
    w = (g.detach().numpy() * v.detach().numpy()) / norm
    assert_close(module.weight, w)
    dw = draw((3, 4), 2)
    module.weight.backward(dw)
    dg = (dw.numpy() * v.detach().numpy() / norm).sum(1, keepdims=True)
    unit = w / numpy.linalg.norm(w, axis=1, keepdims=True)
    across = dw.numpy() - unit * (unit * dw.numpy()).sum(1, keepdims=True)
    assert_close(g.grad, dg)
    assert_close(v.grad, g.detach().numpy() / norm * across)
    inputs = [p.detach().requires_grad_() for p in (g, v)]
    assert gradcheck(variants.WeightNorm(), inputs)
    assert gradgradcheck(variants.WeightNorm(), inputs, atol=1e-4)
    assert gradcheck(variants.WeightNorm(None), [inputs[0][0, 0], inputs[1]])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_weight_norm_of_a_large_layer_in_every_dtype(dtype):
    """Large enough for the fast kernels; 16 bits are rounded once."""
    ours, theirs = (
        norm(layer(lambda: nn.Linear(300, 200), dtype=dtype))
        for norm in (variants.weight_norm, parametrizations.weight_norm)
    )
    x, dy = draw((5, 300), 0, dtype), draw((5, 200), 1, dtype)
    assert_close(learned(ours, x, dy), learned(theirs, x, dy))
    g, v = ours.parametrizations.weight.parameters()
    wide = variants.WeightNorm()(g.float(), v.float())
    assert torch.equal(ours.weight, wide.to(dtype))


def test_a_row_of_zeros_has_no_direction():
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    results = []
    for norm in (variants.weight_norm, parametrizations.weight_norm):
        module = layer(lambda: nn.Linear(2, 2))
        with torch.no_grad():
            module.weight.copy_(rows)
        results.append(norm(module).weight)
    assert_close(*results)
    assert results[0][0].isnan().all()


def test_checkpoints_of_torchs_older_weight_norm_load():
    state = layer(lambda: nn.Linear(4, 3)).state_dict()
    norm = state["weight"].norm(dim=1, keepdim=True)
    old = {"bias": state["bias"], "weight_g": 2 * norm}
    old["weight_v"] = state["weight"] * 5
    ours = nn.Sequential(variants.weight_norm(nn.Linear(4, 3).double()))
    ours.load_state_dict({f"0.{k}": v for k, v in old.items()}, strict=True)
    assert_close(ours[0].weight, 2 * state["weight"])


@pytest.mark.parametrize(
    "norm", [variants.weight_norm, variants.weight_standardization]
)
@table(LAYERS)
def test_a_parametrized_layer_is_copied_removed_assigned_compiled(case, norm):
    make, shape = case
    if make().weight[0].numel() == 1 and norm is not variants.weight_norm:
        pytest.skip("one weight has no deviation")
    module = norm(layer(make))
    x, weight = draw(shape), module.weight.clone()
    expected = module(x)
    twin = copy.deepcopy(module)
    assert_close(twin(x), expected)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2.0).add_(0.1)
    assert_close(twin(x), expected)
    assert not torch.equal(module(x), expected)
    module.load_state_dict(twin.state_dict(), strict=True)
    assert_close(module(x), expected)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), expected)
    module.weight = weight.detach() * 3 + 0.2
    if norm is variants.weight_norm:
        assert_close(module.weight, weight * 3 + 0.2)
    else:
        assert_close(module.weight, weight, tolerance=1e-3)
    parametrize.remove_parametrizations(twin, "weight")
    assert isinstance(twin.weight, nn.Parameter)
    assert_close(twin(x), expected)


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@table(LAYERS)
def test_weight_standardization_of_each_output(case, eps):
    make, shape = case
    module = layer(make)
    w = module.weight.detach().numpy().copy()
    dim = 1 if isinstance(module, nn.ConvTranspose1d) else 0
    if w.size == w.shape[dim]:
        return
    variants.weight_standardization(module, dim=dim, eps=eps)
    rows = numpy.moveaxis(w, dim, 0).reshape(w.shape[dim], -1)
    mean, var = rows.mean(1, keepdims=True), rows.var(1, keepdims=True)
    rows = (rows - mean) / numpy.sqrt(var + eps)
    expected = numpy.moveaxis(
        rows.reshape(numpy.moveaxis(w, dim, 0).shape), 0, dim
    )
    assert_close(module.weight, expected)
    x = draw(shape)
    twin = layer(make)
    with torch.no_grad():
        twin.weight.copy_(torch.from_numpy(numpy.ascontiguousarray(expected)))
    assert_close(module(x), twin(x))
    inputs = [torch.from_numpy(w).requires_grad_()]
    function = variants.WeightStandardization(dim, eps)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, atol=1e-4)


def test_weight_standardization_is_layer_norm_of_the_rows():
    w = draw((4, 2, 3, 3))
    function = variants.WeightStandardization()
    assert_close(function(w), nn.functional.layer_norm(w, (2, 3, 3)))
    narrow = function(w.bfloat16())
    assert torch.equal(narrow, function(w.bfloat16().float()).bfloat16())


def test_the_gradient_of_a_standardized_weight_moves_neither_mean_nor_size():
    module = variants.weight_standardization(
        layer(lambda: nn.Conv2d(2, 4, 3)), eps=0.0
    )
    learned(module, draw((2, 2, 5, 5)), draw((2, 4, 3, 3), 1))
    w = module.parametrizations.weight.original
    assert_close(w.grad.sum((1, 2, 3)), torch.zeros(4))
    centered = w - w.mean((1, 2, 3), keepdim=True)
    assert_close((w.grad * centered).sum((1, 2, 3)), torch.zeros(4))
    assert w.grad.abs().max() > 0.1


@pytest.mark.parametrize(
    ("norm", "kwargs", "error", "message"),
    [
        (variants.weight_norm, {"name": "w"}, ValueError, "'w'"),
        (variants.weight_norm, {"dim": 2}, IndexError, "got 2"),
        (variants.weight_standardization, {"name": "w"}, ValueError, "'w'"),
        (variants.weight_standardization, {"dim": 2}, IndexError, "got 2"),
        (variants.weight_standardization, {"eps": -1.0}, ValueError, "-1"),
        (
            variants.weight_standardization,
            {"name": "bias"},
            ValueError,
            r"more than 1 weight.*\(3,\) with dim=0",
        ),
    ],
)
def test_a_refused_parametrization_leaves_the_layer_as_it_was(
    norm, kwargs, error, message
):
    module = layer(lambda: nn.Linear(4, 3))
    x = draw((2, 4))
    expected = module(x)
    with pytest.raises(error, match=message):
        norm(module, **kwargs)
    assert type(module) is nn.Linear
    assert list(module.state_dict()) == ["weight", "bias"]
    assert_close(module(x), expected, tolerance=0)
    module.load_state_dict(module.state_dict(), strict=True)


def test_weight_norm_twice_is_refused_and_changes_nothing():
    module = variants.weight_norm(layer(lambda: nn.Linear(4, 3)))
    expected = module(draw((2, 4)))
    with pytest.raises(ValueError, match="weight of Parametrized"):
        variants.weight_norm(module)
    assert_close(module(draw((2, 4))), expected, tolerance=0)


@pytest.mark.parametrize(
    "norm", [variants.weight_norm, variants.weight_standardization]
)
def test_a_network_with_normalized_weights_learns(norm):
    assert learns(norm, normlib.BatchNorm1d)


# Dynamic tanh.

DYT = {
    "dense": ((6, 4), 4),
    "tokens": ((2, 5, 4), (4,)),
    "one token": ((1, 1, 4), [4]),
    "a vector": ((4,), 4),
    "image, channels last": ((2, 3, 3, 4), 4),
    "a block": ((3, 2, 4), (2, 4)),
}


@table(DYT)
def test_dyt_is_a_scaled_tanh(case):
    shape, normalized = case
    module = variants.DyT(normalized, 0.7, dtype=torch.float64)
    assert_close(module.alpha, torch.tensor([0.7], dtype=torch.float64))
    x = draw(shape)
    assert_close(module(x), numpy.tanh(0.7 * x.numpy()))
    size = module.weight.shape
    with torch.no_grad():
        module.weight.copy_(draw(size, 1))
        module.bias.copy_(draw(size, 2))
        module.alpha.fill_(-0.3)
    weight, bias = module.weight.detach(), module.bias.detach()
    expected = weight.numpy() * numpy.tanh(-0.3 * x.numpy()) + bias.numpy()
    assert_close(module(x), expected)

    def call(x, *parameters):
        names = dict(zip(("alpha", "weight", "bias"), parameters, strict=True))
        return torch.func.functional_call(module, names, (x,))

    inputs = [x, module.alpha, module.weight, module.bias]
    inputs = [p.detach().requires_grad_() for p in inputs]
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs, atol=1e-4)


def test_dyt_starts_and_restarts_at_the_papers_values():
    module = variants.DyT(4)
    state = copy.deepcopy(module.state_dict())
    expected = {"alpha": [0.5], "weight": [1.0] * 4, "bias": [0.0] * 4}
    assert {k: v.tolist() for k, v in state.items()} == expected
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    module.reset_parameters()
    assert_close(list(module.state_dict().values()), list(state.values()))
    assert repr(module) == "DyT((4,), init_alpha=0.5)"
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    x = draw((2, 4), 0, torch.float32)
    for twin in twins:
        assert_close(twin(x), module.eval()(x), tolerance=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dyt_of_sixteen_bits_is_rounded_once(dtype):
    x = draw((2, 4), 0, dtype)
    for own in (dtype, torch.float32):
        module = variants.DyT(4, dtype=own)
        with torch.no_grad():
            module.weight.copy_(torch.linspace(-1, 3, 4))
            module.bias.fill_(0.3)
        wide = copy.deepcopy(module).float()
        assert torch.equal(module(x), wide(x.float()).to(dtype))


def test_dyt_refuses_what_it_cannot_squash():
    module = variants.DyT(4)
    with pytest.raises(RuntimeError, match=r"\(4,\).*\(2, 3\)"):
        module(torch.ones(2, 3))
    with pytest.raises(NotImplementedError, match="int64"):
        module(torch.ones(2, 4).long())
    with pytest.raises(RuntimeError, match=r"float64.*float32"):
        module(draw((2, 4)))
