"""The diagnostics on problems whose answers are known beforehand."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from devices import over_devices
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint

import normlib
from normlib import diagnostics, models, variants
from normlib.testing import assert_close


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Quadratic(nn.Module):
    """Half of the sum of ``curvature * w^2``, times a number x."""

    def __init__(self, w, curvature):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))
        self.curvature = torch.tensor(curvature, dtype=torch.float64)

    def forward(self, x):
        return x * (self.curvature * self.w**2).sum() / 2


def itself(output):
    return output


ONE = torch.ones((), dtype=torch.float64)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def classes(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, (n,), generator=generator)


def network(norm=normlib.BatchNorm1d, **options):
    return models.mlp([4, 6, 5, 3], norm=norm, **options).double()


BATCH = draw(16, 4), classes(16)


def test_the_beta_of_a_round_bowl_is_its_curvature_at_every_step_size():
    model = Quadratic([1.0, -2.0, 3.0], [0.7, 0.7, 0.7])
    sizes = [0.0, 0.01, 0.5, 3.0]
    walk = diagnostics.gradient_walk(model, itself, ONE, sizes)
    size = torch.tensor(sizes, dtype=torch.float64)
    shrunk = 1 - 0.7 * size
    assert_close(walk.step_size, size)
    assert_close(walk.loss, 0.5 * 0.7 * 14 * shrunk**2)
    assert_close(walk.grad_change, 0.7**2 * math.sqrt(14) * size)
    assert walk.beta == pytest.approx(0.7)


def test_the_beta_of_a_long_bowl_lies_between_its_curvatures():
    model = Quadratic([3.0, 4.0], [1.0, 10.0])
    walk = diagnostics.gradient_walk(model, itself, ONE, [0.1, 0.2])
    gradient = torch.tensor([3.0, 40.0])
    change = torch.tensor([3.0, 400.0])
    assert walk.beta == pytest.approx(float(change.norm() / gradient.norm()))


def test_beta_is_the_largest_ratio_on_the_way():
    def quartic(output):
        return output**2

    model = Quadratic([1.0], [2.0])  # its output is w^2
    walk = diagnostics.gradient_walk(model, quartic, ONE, [0.01, 0.2])
    # w^4: the gradient is 4 w^3, at w = 1 - 4 s.
    ratios = [(4 - 4 * (1 - 4 * s) ** 3) / (4 * s) for s in (0.01, 0.2)]
    assert_close(
        walk.loss, torch.tensor([0.96**4, 0.2**4], dtype=torch.float64)
    )
    assert walk.beta == pytest.approx(max(ratios))


def test_a_walk_moves_the_named_parameters_only():
    model = network()
    names = ["0.weight"]
    walk = diagnostics.gradient_walk(
        model, cross_entropy, BATCH, [0.3], names=names
    )
    x, y = BATCH
    loss = cross_entropy(model(x), y)
    (g,) = torch.autograd.grad(loss, [model[0].weight])
    with torch.no_grad():
        model[0].weight -= 0.3 * g
    loss = cross_entropy(model(x), y)
    (there,) = torch.autograd.grad(loss, [model[0].weight])
    assert_close(walk.loss, loss[None])
    assert_close(walk.grad_change, (there - g).norm()[None])
    assert walk.beta == pytest.approx((there - g).norm() / (0.3 * g.norm()))


def test_one_can_walk_uphill_too():
    model = Quadratic([1.0, -2.0], [0.7, 0.7])
    walk = diagnostics.gradient_walk(model, itself, ONE, [-0.1])
    assert walk.loss > model(ONE)
    assert walk.beta == pytest.approx(0.7)


def test_a_parameter_that_is_not_used_has_no_gradient():
    model = network()
    model.spare = nn.Linear(2, 2).double()
    model.forward = lambda x: model[:7](x)
    walk = diagnostics.gradient_walk(
        model, cross_entropy, BATCH, [0.3], names=["spare.weight"]
    )
    assert walk.grad_change == 0
    told = diagnostics.scale_invariance(model, cross_entropy, BATCH)
    assert "spare.weight" in told.invariant()


def test_no_walk_no_beta():
    model = Quadratic([1.0], [2.0])
    for sizes in ([], [0.0]):
        walk = diagnostics.gradient_walk(model, itself, ONE, sizes)
        assert len(walk.loss) == len(sizes)
        assert math.isnan(walk.beta)


def test_every_point_of_a_walk_sees_the_same_noise():
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(), nn.Linear(50, 3))
    walk = diagnostics.gradient_walk(
        model.double(), cross_entropy, BATCH, [0.0, 0.0]
    )
    assert (walk.grad_change == 0).all()
    assert walk.loss[0] == walk.loss[1]


def chain(*widths, seed=0):
    """Linear layers without a bias, and matrices that one can multiply."""
    layers = [
        nn.Linear(a, b, bias=False, dtype=torch.float64)
        for a, b in pairwise(widths)
    ]
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.weight.copy_(draw(*layer.weight.shape, seed=seed + i))
    return nn.Sequential(*layers)


def half_square(output, target):
    return (output - target).square().sum() / 2


def test_gradient_shift_of_a_linear_network_has_a_closed_form():
    old, new = chain(3, 4, 2), chain(3, 4, 2, seed=5)
    x, t = draw(7, 3), draw(7, 2)
    shift = diagnostics.gradient_shift(
        new, half_square, (x, t), old.state_dict()
    )
    u, w = (layer.weight.detach() for layer in old)
    v = new[0].weight.detach()
    first = w.T @ (x @ u.T @ w.T - t).T @ x
    g = (x @ u.T @ w.T - t).T @ (x @ u.T)
    moved = (x @ v.T @ w.T - t).T @ (x @ v.T)
    assert shift.layers == ("0", "1")
    assert_close(shift.norm, torch.stack([first.norm(), g.norm()]))
    assert_close(shift.distance[1], (g - moved).norm())
    cosine = (g * moved).sum() / (g.norm() * moved.norm())
    assert_close(shift.cosine, torch.stack([torch.ones_like(cosine), cosine]))
    assert shift.distance[0] == 0


def test_without_a_step_no_gradient_shifts():
    model = network()
    shift = diagnostics.gradient_shift(
        model, cross_entropy, BATCH, model.state_dict()
    )
    assert shift.layers == ("0", "3", "6")
    assert (shift.distance == 0).all()
    assert_close(shift.cosine, torch.ones(3))


def test_what_lies_in_front_of_a_layer_includes_the_norms():
    model = network()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[1].bias += 1.0  # the first norm's
    shift = diagnostics.gradient_shift(
        model, cross_entropy, BATCH, before, layers=["0", "1", "3"]
    )
    assert (shift.distance[:2] == 0).all()
    assert shift.distance[2] > 0.01


def test_a_layer_that_is_not_trained_has_no_shift():
    model = network()
    model[3].requires_grad_(False)
    shift = diagnostics.gradient_shift(
        model, cross_entropy, BATCH, model.state_dict()
    )
    assert shift.layers == ("0", "6")


def test_a_block_is_a_layer_with_all_that_is_in_it():
    x, t = draw(7, 3), draw(7, 2)
    old, new = chain(3, 4, 2), chain(3, 4, 2, seed=5)
    told = diagnostics.gradient_shift(
        nn.Sequential(new),
        half_square,
        (x, t),
        nn.Sequential(old).state_dict(),
        layers=["0"],
    )
    assert told.distance.tolist() == [0]  # nothing in front of it


def test_distribution_shift_is_that_of_the_layers_input():
    model = models.mlp([2, 3, 2], act=nn.Identity).double()
    before = copy.deepcopy(model.state_dict())
    move, grow = torch.tensor([1.0, -2.0, 0.0]).double(), 3.0
    x = draw(40, 2)
    h = model[0](x).detach()
    with torch.no_grad():
        model[0].weight *= grow
        model[0].bias += move
    shift = diagnostics.distribution_shift(model, x, before)
    assert shift.layers == ("0", "2")
    for told in shift[1:4]:
        assert (told[0] == 0).all()  # the data
    mean, std = h.mean(0), h.std(0, correction=0)
    assert_close(shift.mean[1], (grow - 1) * mean + move)
    assert_close(shift.std[1], (grow - 1) * std)
    assert_close(shift.scale[1], std)
    carried = (grow * h + move).sort(0).values - h.sort(0).values
    assert_close(shift.wasserstein[1], carried.abs().mean(0))
    assert (shift.wasserstein[1] >= shift.mean[1].abs()).all()


def test_a_shift_without_another_shape_is_carried_by_the_shift_of_the_mean():
    model = models.mlp([2, 3, 2], act=nn.Identity).double()
    before = copy.deepcopy(model.state_dict())
    move = torch.tensor([1.0, -2.0, 0.5]).double()
    with torch.no_grad():
        model[0].bias += move
    shift = diagnostics.distribution_shift(model, (draw(9, 2), None), before)
    assert_close(shift.wasserstein[1], move.abs())
    assert_close(shift.mean[1], move)


def test_equal_moments_do_not_hide_another_distribution():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1))
    before = {n: torch.ones_like(p) for n, p in model.state_dict().items()}
    with torch.no_grad():
        model[0].weight.fill_(-1.0)
    # Mean 0 and its variance stay; the skewed sample is turned around.
    x = torch.tensor([[-1.0], [-1.0], [2.0]])
    shift = diagnostics.distribution_shift(model, x, before)
    assert shift.mean[1] == 0
    assert shift.std[1] == 0
    assert shift.wasserstein[1] == pytest.approx(4 / 3)


def test_units_of_a_sequence_lie_on_the_last_axis():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[0].bias += torch.tensor([1.0, 2.0, 3.0])
    x = torch.randn(4, 5, 2)
    shift = diagnostics.distribution_shift(model, x, before, axis=-1)
    assert_close(shift.mean[1], torch.tensor([1.0, 2.0, 3.0]), tolerance=1e-5)


def test_noise_shifts_the_inputs_behind_a_noisy_batch_norm():
    for norm, still in (
        (normlib.BatchNorm1d, True),
        (variants.NoisyBatchNorm, False),
    ):
        model = network(norm)
        shift = diagnostics.distribution_shift(
            model, BATCH, model.state_dict()
        )
        assert (shift.wasserstein[1].max() == 0) == still


def test_a_profile_has_the_statistics_of_each_output():
    model = chain(3, 4, 2)
    x, t = draw(7, 3), draw(7, 2)
    profile = diagnostics.layer_profile(model, half_square, (x, t))
    h = (x @ model[0].weight.T).detach()
    y = (h @ model[1].weight.T).detach()
    dy = y - t
    dh = dy @ model[1].weight.detach()
    assert profile.layers == ("0", "1")
    assert profile.kinds == ("Linear", "Linear")
    assert_close(profile.mean, torch.stack([h.mean(), y.mean()]))
    assert_close(
        profile.std,
        torch.stack([h.std(correction=0), y.std(correction=0)]),
    )
    assert_close(profile.gradient, torch.stack([dh.norm(), dy.norm()]))
    weights = [(dh.T @ x).norm(), (dy.T @ h).norm()]
    assert_close(profile.weight_gradient, torch.stack(weights))
    assert profile.flat.isnan().all()


@pytest.mark.parametrize(
    ("act", "inputs", "flat"),
    [
        (nn.ReLU(), [-1.0, -0.1, 0.1, 3.0], 1 / 2),
        (nn.ReLU(inplace=True), [-1.0, -0.1, 0.1, 3.0], 1 / 2),
        # sigmoid' = 0.0452 at 3, 0.105 at 2; tanh' = 0.0707 at 2.
        (nn.Sigmoid(), [0.0, 2.0, 3.0, -3.0], 1 / 2),
        (nn.Tanh(), [0.0, 2.0, 3.0, -3.0], 1 / 2),
        (nn.Tanh(), [0.0, 2.0, 1.0, -3.0], 1 / 4),
        (nn.SiLU(inplace=True), [-30.0, -20.0, 1.0, 2.0], 1 / 2),
        (nn.SiLU(), [-30.0, -2.4, 1.0, 2.0], 1 / 4),  # it falls at -2.4
        (nn.Softmax(1), [1.0, 2.0, 3.0, 4.0], math.nan),
    ],
    ids=repr,
)
def test_flat_is_the_share_where_the_slope_is_small(act, inputs, flat):
    model = nn.Sequential(nn.Linear(1, 1), act, nn.Linear(1, 1))
    nn.init.ones_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    x = torch.tensor(inputs)[:, None]
    profile = diagnostics.layer_profile(model, torch.sum, x)
    assert profile.kinds[1] == type(act).__name__
    assert profile.flat[1].item() == pytest.approx(flat, nan_ok=True)
    assert profile.gradient.isfinite().all()


def test_an_activation_may_be_given_its_input_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.act = nn.Linear(4, 3).double(), nn.ReLU(True)

        def forward(self, x):
            return self.act(input=self.linear(x))

    model = Named()
    profile = diagnostics.layer_profile(model, cross_entropy, BATCH)
    dead = (model.linear(BATCH[0]) < 0).double().mean()
    assert_close(profile.flat[1], dead)


def test_a_profile_is_in_the_order_of_the_calls():
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()
            self.last = nn.Linear(4, 3)
            self.first = nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.act(self.first(self.act(x))))

    profile = diagnostics.layer_profile(
        Swapped().double(), cross_entropy, BATCH
    )
    assert profile.layers == ("act", "first", "act", "last")
    assert profile.gradient.isnan().tolist() == [True, False, False, False]
    named = diagnostics.layer_profile(
        Swapped().double(), cross_entropy, BATCH, layers=["last"]
    )
    assert named.layers == ("last",)


def test_weights_in_front_of_batch_norm_are_scale_invariant():
    bare = [normlib.BatchNorm1d(n, eps=1e-30) for n in (6, 5)]
    layers = [nn.Linear(4, 6), bare[0], nn.ReLU(), nn.Linear(6, 5), bare[1]]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(5, 3)).double()
    nn.init.ones_(bare[0].bias)
    told = diagnostics.scale_invariance(model, cross_entropy, BATCH)
    free = ("0.weight", "0.bias", "3.weight", "3.bias")
    # The biases too: batch norm takes them out.
    assert told.invariant(1e-10) == free
    rest = [n in ("1.weight", "6.weight") for n in told.names]
    assert (told.loss[torch.tensor(rest)] > 1e-6).all()
    told = diagnostics.scale_invariance(
        model, cross_entropy, BATCH, factor=3, names=["0.weight"]
    )
    assert told.names == ("0.weight",)
    assert told.invariant(1e-10) == told.names


def test_between_two_norms_the_first_weight_is_scale_invariant_without_bias():
    # ReLU of c * weight * xhat is c times that, and the next norm divides it
    # out; a bias is in the way.
    model = network()
    for bias, free in ((0.0, True), (1.0, False)):
        nn.init.constant_(model[1].bias, bias)
        told = diagnostics.scale_invariance(model, cross_entropy, BATCH)
        assert ("1.weight" in told.invariant()) == free


def test_eps_breaks_scale_invariance_a_little():
    model = network()
    nn.init.ones_(model[1].bias)
    told = diagnostics.scale_invariance(model, cross_entropy, BATCH)
    assert told.invariant() == ("0.weight", "3.weight")
    assert told.invariant(1e-12) == ()


def test_a_homogeneous_loss_is_known_by_its_three_numbers():
    # L = |w|^2 / 2: gradient w, parallel to w; c * cw - w; c^2 - 1.
    model = Quadratic([3.0, 4.0], [1.0, 1.0])
    told = diagnostics.scale_invariance(model, itself, ONE, factor=2.0)
    numbers = [told.cosine, told.gradient, told.loss]
    assert_close(numbers, torch.tensor([[1.0], [3.0], [3.0]]).unbind())


def test_in_float32_a_zero_gradient_counts_as_zero():
    layers = [nn.Linear(4, 6), normlib.BatchNorm1d(6), nn.Linear(6, 3)]
    model = nn.Sequential(*layers)
    nn.init.ones_(model[0].bias)
    batch = BATCH[0].float(), BATCH[1]
    told = diagnostics.scale_invariance(model, cross_entropy, batch)
    assert told.invariant() == ("0.weight", "0.bias")


@pytest.mark.parametrize("factor", [1, 0, -2.0, math.inf, math.nan])
def test_a_factor_that_says_nothing_is_refused(factor):
    with pytest.raises(ValueError, match=f"factor={factor}"):
        diagnostics.scale_invariance(
            network(), cross_entropy, BATCH, factor=factor
        )


def test_gradient_noise_is_the_variance_of_one_example_over_the_batch_size():
    model = chain(3, 1)
    x, t = draw(20, 3), draw(20, 1)
    each = (x @ model[0].weight.T - t).detach() * x  # of (wx - t)^2 / 2
    covariance = (each - each.mean(0)).square().mean(0).sum().item()
    square = each.mean(0).square().sum().item()

    def loss_fn(output, target):
        return mse_loss(output, target) / 2

    noise = diagnostics.gradient_noise(
        model, loss_fn, (x, t), [2, 8], draws=1500
    )
    assert noise.batch_size.tolist() == [2, 8]
    for i, size in enumerate((2, 8)):
        expected = covariance / size
        assert noise.variance[i].item() == pytest.approx(expected, rel=0.15)
        assert noise.square[i].item() == pytest.approx(square, rel=0.15)
        simple = covariance / square
        assert noise.scale[i].item() == pytest.approx(simple, rel=0.3)


def test_examples_that_agree_make_no_noise():
    model = chain(3, 1)
    x, t = draw(1, 3).expand(9, 3), draw(1, 1).expand(9, 1)
    noise = diagnostics.gradient_noise(model, mse_loss, (x, t), [1, 4])
    assert_close(noise.variance, torch.zeros(2))
    assert_close(noise.scale, torch.zeros(2))
    assert (noise.square > 0).all()


def test_a_signal_that_is_not_there_has_an_infinite_scale():
    model = chain(1, 1)
    x, t = torch.ones(2, 1).double(), torch.tensor([[1.0], [-1.0]]).double()
    nn.init.zeros_(model[0].weight)
    noise = diagnostics.gradient_noise(model, mse_loss, (x, t), [1], draws=3)
    drawn = torch.randint(2, (3,), generator=torch.Generator().manual_seed(0))
    assert len(set(drawn.tolist())) == 2
    assert noise.scale.item() == math.inf


def test_gradient_noise_follows_its_seed_and_counts_dropout():
    model = nn.Sequential(nn.Linear(4, 20), nn.Dropout(), nn.Linear(20, 3))
    model.double()
    x, y = BATCH[0][:1].expand(6, 4), BATCH[1][:1].expand(6)
    told = [
        diagnostics.gradient_noise(model, cross_entropy, (x, y), [3], seed=s)
        for s in (0, 1)
    ]
    # The examples are all the same: what scatters is dropout.
    assert min(t.variance for t in told) > 1e-3
    noise = [
        diagnostics.gradient_noise(
            network(), cross_entropy, BATCH, [4], draws=4, seed=s
        ).variance
        for s in (0, 0, 1)
    ]
    assert noise[0] == noise[1] != noise[2]


@pytest.mark.parametrize(
    ("sizes", "draws", "told"),
    [([4, 0], 8, r"batch_sizes=\[4, 0\]"), ([4], 1, "draws=1")],
)
def test_gradient_noise_refuses_what_has_no_variance(sizes, draws, told):
    with pytest.raises(ValueError, match=told):
        diagnostics.gradient_noise(
            network(), cross_entropy, BATCH, sizes, draws=draws
        )


# As it was


class Fussy(nn.Module):
    """All that a measurement might disturb, in one network."""

    def __init__(self, device="cpu"):
        super().__init__()
        generator = torch.Generator(device).manual_seed(3)
        self.one = nn.Linear(4, 6)
        self.norm = variants.NoisyBatchNorm(6, generator=generator)
        self.drop = nn.Dropout()
        self.two = nn.Linear(6, 3)
        self.two.weight.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.to(device, torch.float64)

    def forward(self, x):
        self.calls += 1
        return self.two(self.drop(torch.relu(self.norm(self.one(x)))))


def photograph(model, device):
    """Everything that is to be the same afterwards."""
    torch.manual_seed(11)
    if device == "cuda":
        torch.cuda.manual_seed(12)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    grads = {n: p.grad for n, p in model.named_parameters()}
    hooks = [
        len(m._forward_hooks) + len(m._forward_pre_hooks)
        for m in model.modules()
    ]

    def state():
        return [
            [t.clone() for t in tensors.values()],
            [g.clone() for g in grads.values() if g is not None],
            [torch.get_rng_state(), model.norm.generator.get_state()],
            [torch.cuda.get_rng_state()] if device == "cuda" else [],
        ]

    before = state()

    def unchanged():
        now = dict(model.named_parameters()) | dict(model.named_buffers())
        assert all(now[n] is tensors[n] for n in now)
        assert all(p.grad is grads[n] for n, p in model.named_parameters())
        for old, new in zip(before, state(), strict=True):
            assert len(old) == len(new)
            assert all(map(torch.equal, old, new))
        assert [
            len(m._forward_hooks) + len(m._forward_pre_hooks)
            for m in model.modules()
        ] == hooks
        assert [m.training for m in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == able

    modes = [m.training for m in model.modules()]
    able = [p.requires_grad for p in model.parameters()]
    return unchanged


CALLS = {
    "walk": lambda m, f, b: diagnostics.gradient_walk(m, f, b, [0.1, 1.0]),
    "gradient shift": lambda m, f, b: diagnostics.gradient_shift(
        m, f, b, {n: t + 0.5 for n, t in m.state_dict().items()}
    ),
    "distribution shift": lambda m, f, b: diagnostics.distribution_shift(
        m, b, {n: t + 0.5 for n, t in m.state_dict().items()}
    ),
    "profile": diagnostics.layer_profile,
    "scale": diagnostics.scale_invariance,
    "noise": lambda m, f, b: diagnostics.gradient_noise(m, f, b, [4, 8]),
}


@over_devices
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_measurement_leaves_the_model_as_it_was(call, grad, device):
    model = Fussy(device)
    model.drop.eval()
    x, y = BATCH
    cross_entropy(model(x.to(device)), y.to(device)).backward()
    unchanged = photograph(model, device)
    with torch.set_grad_enabled(grad):
        call(model, cross_entropy, BATCH)
        assert torch.is_grad_enabled() == grad
    unchanged()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_so_does_one_that_fails_halfway(call):
    model = Fussy()
    unchanged = photograph(model, "cpu")
    count = []

    def clumsy(*args):
        count.append(None)
        model.eval()
        if len(count) == 2 or call is CALLS["profile"]:
            raise RuntimeError("the second time")
        return cross_entropy(*args)

    class Failing(nn.Linear):
        def forward(self, x):
            model.eval()
            raise RuntimeError("the second time")

    if call is CALLS["distribution shift"]:
        model.two.__class__ = Failing
    with pytest.raises(RuntimeError, match="the second time"):
        call(model, clumsy, BATCH)
    unchanged()


def test_a_model_may_take_keyword_arguments():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, *, pixels):
            return self.net(pixels)

    model, (x, y) = Named(), BATCH
    plain = diagnostics.gradient_walk(model.net, cross_entropy, (x, y), [0.5])
    named = diagnostics.gradient_walk(
        model, cross_entropy, ({"pixels": x}, y), [0.5]
    )
    assert_close(named.loss, plain.loss)
    assert named.beta == pytest.approx(plain.beta)
    shift = diagnostics.distribution_shift(
        model, {"pixels": x}, model.state_dict()
    )
    assert shift.layers == ("net.0", "net.3", "net.6")


def test_a_parametrized_weight_belongs_to_its_layer():
    model = nn.Sequential(variants.weight_norm(nn.Linear(4, 3))).double()
    state = model.state_dict()
    for shift in (
        diagnostics.distribution_shift(model, BATCH, state),
        diagnostics.gradient_shift(model, cross_entropy, BATCH, state),
    ):
        assert shift.layers == ("0",)
    profile = diagnostics.layer_profile(model, cross_entropy, BATCH)
    assert profile.layers == ("0",)
    assert profile.weight_gradient > 0
    told = diagnostics.scale_invariance(model, cross_entropy, BATCH)
    (v,) = told.invariant(1e-6)  # the direction, not the length
    assert v.startswith("0.parametrizations.weight")


def test_a_shared_layer_counts_once():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 3)).double()
    shift = diagnostics.gradient_shift(
        model, cross_entropy, BATCH, model.state_dict()
    )
    assert shift.layers == ("0", "3")
    walk = diagnostics.gradient_walk(model, cross_entropy, BATCH, [0.1])
    assert walk.grad_change > 0


def test_a_compiled_model_is_looked_into():
    """Its code, compiled before, calls no hooks."""
    model = network()
    compiled = torch.compile(model, backend="eager")
    compiled(BATCH[0])
    profiles = [
        diagnostics.layer_profile(m, cross_entropy, BATCH)
        for m in (model, compiled)
    ]
    assert profiles[1].kinds == profiles[0].kinds
    assert_close(profiles[1].gradient, profiles[0].gradient)


def test_a_checkpoint_is_computed_again_in_the_same_state():
    """In the backward pass, with the state and the noise of the forward."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.net.insert(2, nn.Dropout())

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    model = Checkpointed()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    told = [
        diagnostics.gradient_walk(m, cross_entropy, BATCH, [0.1, 2.0])
        for m in (model.net, model)
    ]
    assert_close(told[1].grad_change, told[0].grad_change)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_loss_may_look_at_the_parameters():
    """A penalty is that of the state in which the model is."""
    model = nn.Linear(3, 1, bias=False).double()

    def penalty(output):
        return model.weight.square().sum() / 2

    walk = diagnostics.gradient_walk(model, penalty, draw(4, 3), [0.5])
    assert walk.beta == pytest.approx(1)
    start = model.weight.square().sum().item() / 2
    assert walk.loss.item() == pytest.approx(0.25 * start)


def test_gradients_are_taken_in_inference_mode_too():
    model = network()
    expected = diagnostics.gradient_walk(model, cross_entropy, BATCH, [0.5])
    with torch.inference_mode():
        walk = diagnostics.gradient_walk(model, cross_entropy, BATCH, [0.5])
    assert_close(walk.grad_change, expected.grad_change)
    assert walk.beta == pytest.approx(expected.beta)


def test_the_earlier_state_has_its_buffers():
    """In evaluation batch norm shifts what it gives by its running mean."""
    model = nn.Sequential(nn.BatchNorm1d(4, eps=0), nn.Linear(4, 3))
    model = model.double().eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model[0].running_mean.add_(2)
    shift = diagnostics.distribution_shift(model, BATCH, before)
    assert_close(shift.mean[0], torch.full((4,), -2.0))
    # The gradient is read in the earlier state's buffers at both ends.
    shift = diagnostics.gradient_shift(model, cross_entropy, BATCH, before)
    assert shift.distance == 0
    loss = cross_entropy(model[1](BATCH[0]), BATCH[1])
    grads = torch.autograd.grad(loss, model[1].parameters())
    norm = torch.cat([g.flatten() for g in grads]).norm()
    assert_close(shift.norm[0], norm)


def test_a_layer_that_is_called_twice_is_given_both_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4).double()

        def forward(self, x):
            return self.layer(self.layer(x))

    model, x = Twice(), BATCH[0]
    shift = diagnostics.distribution_shift(model, x, model.state_dict())
    both = torch.cat([x, model.layer(x)])
    assert_close(shift.scale[0], both.std(0, correction=0))


def test_a_sparse_gradient_is_one_like_others():
    def model(sparse):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(9, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 3)
        ).double()

    batch = classes(32).reshape(16, 2), BATCH[1]
    told = [
        (
            diagnostics.gradient_walk(m, cross_entropy, batch, [0.5]).beta,
            diagnostics.gradient_noise(m, cross_entropy, batch, [4]).variance,
            diagnostics.layer_profile(m, cross_entropy, batch).weight_gradient,
        )
        for m in map(model, (False, True))
    ]
    for one, other in zip(*told, strict=True):
        assert_close(torch.as_tensor(one), torch.as_tensor(other))


# What is refused


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda m: diagnostics.gradient_walk(
                m, cross_entropy, BATCH, [1.0], names=["9.weight"]
            ),
            r"\['9.weight'\] are not among .* 0.weight, ",
        ),
        (
            lambda m: diagnostics.gradient_walk(
                m, lambda output, y: output, BATCH, [1.0]
            ),
            r"shape \(16, 3\), not one number",
        ),
        (
            lambda m: diagnostics.gradient_shift(
                m, cross_entropy, BATCH, m.state_dict(), layers=["2"]
            ),
            r"layers \['2'\] have no parameter",
        ),
        (
            lambda m: diagnostics.gradient_shift(
                m, cross_entropy, BATCH, {"0.weight": m[0].weight}
            ),
            "lacks '1.weight'",
        ),
        (
            lambda m: diagnostics.distribution_shift(
                m, BATCH, m.state_dict() | {"0.weight": torch.ones(2, 2)}
            ),
            r"'0.weight' has shape \(2, 2\) .* and \(6, 4\)",
        ),
        (
            lambda m: diagnostics.distribution_shift(
                m, BATCH, m.state_dict(), layers=["twelve"]
            ),
            "twelve",
        ),
        (
            lambda m: diagnostics.layer_profile(
                m, cross_entropy, BATCH, layers=["twelve"]
            ),
            "twelve",
        ),
        (
            lambda m: diagnostics.gradient_walk(
                nn.ReLU(), cross_entropy, BATCH, [1.0]
            ),
            "no parameter",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_with_its_name(call, told):
    with pytest.raises(ValueError, match=told):
        call(network())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_scripted_part_is_refused_by_name(call):
    """It keeps its parameters, whichever it is lent."""
    model = network()
    model[3] = torch.jit.script(model[3])
    with pytest.raises(TypeError, match="'3' is a ScriptModule"):
        call(model, cross_entropy, BATCH)
    assert not any(m._forward_hooks for m in model if m is not model[3])


def test_a_layer_that_is_not_called_is_refused_by_name():
    model = network()
    model.spare = nn.Identity()
    model.forward = lambda x: model[:7](x)
    with pytest.raises(ValueError, match=r"\['spare'\] are not called"):
        diagnostics.distribution_shift(
            model, BATCH, model.state_dict(), layers=["0", "spare"]
        )
