"""What holds of the norms for every shape, dtype, layout and grouping."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import Case
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from twins import CHOICES, DTYPES, EVERYWHERE, REFUSAL, chosen

from normlib import functional
from normlib.axes import stat_axes
from normlib.testing import TOLERANCE, assert_close

NORMS = ["batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"]

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}

CHOICE = st.sampled_from(CHOICES)
LAYOUT = st.sampled_from(sorted(LAYOUTS))


def values(shape, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


@st.composite
def cases(draw, norms=tuple(NORMS), largest=5):
    """A norm with a shape that torch takes, of any rank that torch takes."""
    norm = draw(st.sampled_from(norms))
    least = 3 if norm == "instance_norm" else 2
    shape = tuple(
        draw(st.lists(st.integers(1, largest), min_size=least, max_size=5))
    )
    groups = normalized = None
    if norm == "group_norm":
        groups = draw(st.integers(1, largest))
        shape = (shape[0], groups * shape[1], *shape[2:])
    if norm in ("layer_norm", "rms_norm"):
        normalized = shape[draw(st.integers(0, len(shape) - 1)) :]
    assume(math.prod(shape) > 1)
    case = Case(norm, shape, groups, normalized)
    counted = norm in ("batch_norm", "instance_norm")
    assume(not counted or case.view.count(case.kind["over_batch"]) > 1)
    # torch counts the values of all groups with one position as one.
    assume(norm != "group_norm" or math.prod(shape) > groups)
    return case


def parameters(case, dtype, affine):
    weight = values(case.parameter_shape, 1, dtype) + 1 if affine else None
    bias = values(case.parameter_shape, 2, dtype) if affine else None
    return weight, bias if case.has_bias else None


def step(library, case, x, weight, bias, dy, eps):
    """y and the gradients; the leaf is x itself, with its strides."""
    leaves = [
        None if p is None else p.detach().requires_grad_()
        for p in (x, weight, bias)
    ]
    y = case.of(library, *leaves, eps)
    given = [leaf for leaf in leaves if leaf is not None]
    return [y.detach(), *torch.autograd.grad(y, given, dy)]


@settings(deadline=None, max_examples=400)
@given(
    case=cases(),
    choice=CHOICE,
    dtype=st.sampled_from(DTYPES),
    affine=st.booleans(),
    layout=LAYOUT,
    dy_layout=LAYOUT,
    mean=st.sampled_from([0.0, 1.0, -30.0]),
    eps=st.sampled_from([1e-3, 0.1, 10.0]),
)
@example(
    Case("layer_norm", (3, 4, 2, 2), None, (2, 2)),
    EVERYWHERE,
    torch.float64,
    False,
    "channels last",
    "contiguous",
    0.0,
    0.1,
)
def test_it_is_torchs(
    case, choice, dtype, affine, layout, dy_layout, mean, eps
):
    """Forward and backward: of its dtype, and no further from float64."""
    half = dtype in DTYPES[2:]
    x = LAYOUTS[layout](values(case.shape, 0, dtype) + (0 if half else mean))
    dy = values(case.shape, 3, dtype)
    rest = (*parameters(case, dtype, affine), dy)
    theirs = step(F, case, x, *rest, eps)
    wide = [None if p is None else p.double() for p in (x, *rest)]
    exact = step(F, case, *wide, eps)
    with chosen(choice):
        odd = (*rest[:2], LAYOUTS[dy_layout](dy))
        try:
            ours = step(functional, case, x, *odd, eps)
        except RuntimeError as refusal:
            if choice != "cpu" or REFUSAL not in str(refusal):
                raise
            return
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        lost = (b - e).abs().max().item() / max(1, e.abs().max().item())
        assert_close(a, e, tolerance=max(TOLERANCE[dtype], 1.5 * lost))


@settings(deadline=None, max_examples=100)
@given(
    n=st.integers(1, 4),
    groups=st.integers(1, 4),
    channels=st.integers(1, 3),
    positions=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    choice=CHOICE,
    layout=LAYOUT,
)
def test_group_norm_lies_between_layer_norm_and_instance_norm(
    n, groups, channels, positions, choice, layout
):
    """One group: layer norm of the image. One channel each: instance norm."""
    c = groups * channels
    x = LAYOUTS[layout](values((n, c, *positions), 0))
    assume(math.prod(positions) > 1)
    with chosen("eager" if choice == "cpu" else choice):
        one, each = (functional.group_norm(x, g) for g in (1, c))
        assert_close(one, functional.layer_norm(x, x.shape[1:]))
        assert_close(each, functional.instance_norm(x))
        single = x[:1]
        assert_close(
            functional.batch_norm(single, None, None, training=True),
            functional.instance_norm(single),
        )


@settings(deadline=None, max_examples=100)
@given(
    case=cases(),
    choice=st.sampled_from(["default", EVERYWHERE, "eager"]),
    shift=st.floats(-10, 10),
    scale=st.floats(0.1, 10),
)
def test_shift_and_scale_of_the_input(case, choice, shift, scale):
    """Scale changes nothing; a shift nothing where the norm centers."""
    assume(case.view.count(case.kind["over_batch"]) > 1)
    x = values(case.shape, 0) + values(case.shape, 1)
    weight, bias = parameters(case, torch.float64, True)
    moved = scale * x + (shift if case.kind["centered"] else 0.0)
    with chosen(choice):
        y, again = (
            case.of(functional, t, weight, bias, 1e-12) for t in (x, moved)
        )
    var = x.reshape(case.view).var(
        stat_axes(case.kind["over_batch"]), correction=0
    )
    assume(var.min() > 1e-2)  # or else eps is not small beside it
    assert_close(again, y, tolerance=1e-6)


@settings(deadline=None, max_examples=100)
@given(
    case=cases(
        norms=("instance_norm", "group_norm", "layer_norm", "rms_norm")
    ),
    choice=st.sampled_from(["default", EVERYWHERE, "eager"]),
)
def test_an_instance_does_not_know_its_batch(case, choice):
    """Alone, or with others in its place, it comes out the same."""
    assume(case.normalized is None or len(case.normalized) < len(case.shape))
    assume(math.prod(case.shape[1:]) > 1)
    single = case._replace(shape=(1, *case.shape[1:]))
    assume(case.groups is None or math.prod(single.shape) > case.groups)
    x = values(case.shape, 0)
    weight, bias = parameters(case, torch.float64, True)
    other = x + values(case.shape, 1)
    other[0] = x[0]
    with chosen(choice):
        y, among, alone = (
            c.of(functional, t, weight, bias, 1e-5)
            for c, t in ((case, x), (case, other), (single, x[:1]))
        )
    assert_close(among[0], y[0])
    assert_close(alone[0], y[0])


def test_an_instance_of_batch_norm_does():
    x = values((4, 3), 0)
    other = x.clone()
    other[1] += 1
    y, among = (
        functional.batch_norm(t, None, None, training=True) for t in (x, other)
    )
    assert (among[0] - y[0]).abs().min() > 1e-3


@settings(deadline=None, max_examples=50)
@given(
    data=st.data(),
    norm=st.sampled_from(["batch", "instance", "layer", "rms", "group 1"]),
    c=st.integers(2, 6),
)
def test_a_permutation_of_the_channels_is_carried_through(data, norm, c):
    """Which of them come together in a statistic does not change."""
    order = data.draw(st.permutations(range(c)))
    x = values((3, c, 4), 0)
    weight, bias = values((c,), 1), values((c,), 2)

    def f(x, w, b):
        last = x.movedim(1, -1)
        return {
            "batch": lambda: functional.batch_norm(x, None, None, w, b, True),
            "instance": lambda: functional.instance_norm(x, None, None, w, b),
            "group 1": lambda: functional.group_norm(x, 1, w, b),
            "layer": lambda: functional.layer_norm(last, (c,), w, b),
            "rms": lambda: functional.rms_norm(last, (c,), w, 1e-5),
        }[norm]()

    for choice in ("default", EVERYWHERE, "eager"):
        with chosen(choice):
            y, again = (
                f(x, weight, bias),
                f(x[:, order], weight[order], bias[order]),
            )
        moved = y[..., order] if norm in ("layer", "rms") else y[:, order]
        assert_close(again, moved)


@settings(deadline=None, max_examples=50)
@given(data=st.data(), g=st.integers(1, 3), k=st.integers(1, 3))
def test_group_norm_carries_permutations_within_and_of_groups(data, g, k):
    groups = data.draw(st.permutations(range(g)))
    order = [
        group * k + i
        for group in groups
        for i in data.draw(st.permutations(range(k)))
    ]
    x = values((2, g * k, 4), 0)
    y, again = (functional.group_norm(t, g) for t in (x, x[:, order]))
    assert_close(again, y[:, order])


def test_group_norm_does_not_carry_every_permutation():
    x = values((2, 4, 5), 0)
    order = [0, 2, 1, 3]
    y, again = (functional.group_norm(t, 2) for t in (x, x[:, order]))
    assert (again - y[:, order]).abs().max() > 0.1


@settings(deadline=None, max_examples=100)
@given(case=cases(), choice=st.sampled_from(["default", EVERYWHERE, "eager"]))
def test_the_gradient_is_orthogonal_to_what_the_norm_ignores(case, choice):
    """To x itself, as scale changes nothing; and to 1 where it centers."""
    assume(case.view.count(case.kind["over_batch"]) > 2)
    x = values(case.shape, 0)
    axes = stat_axes(case.kind["over_batch"])
    assume(x.reshape(case.view).var(axes, correction=0).min() > 1e-2)
    dy = values(case.shape, 1)
    with chosen(choice):
        _, dx = step(functional, case, x, None, None, dy, 1e-14)
    dx4, x4 = dx.reshape(case.view), x.reshape(case.view)
    assert_close((dx4 * x4).sum(axes), torch.zeros_like(x4.sum(axes)))
    if case.kind["centered"]:
        assert_close(dx4.sum(axes), torch.zeros_like(x4.sum(axes)))


@settings(deadline=None, max_examples=100)
@given(case=cases(), choice=st.sampled_from(["default", EVERYWHERE, "eager"]))
def test_what_comes_out_has_moments_zero_and_almost_one(case, choice):
    x = values(case.shape, 0) * 3 + 2
    axes = stat_axes(case.kind["over_batch"])
    with chosen(choice):
        y = case.of(functional, x, None, None, 1e-3).reshape(case.view)
    x4 = x.reshape(case.view)
    if case.kind["centered"]:
        x4 = x4 - x4.mean(axes, keepdim=True)
        assert_close(y.mean(axes), torch.zeros_like(y.mean(axes)))
    size = x4.square().mean(axes)
    assert_close(y.square().mean(axes), size / (size + 1e-3))


@settings(deadline=None, max_examples=100)
@given(
    case=cases(),
    used=st.sets(st.sampled_from(["y", "mean", "var"]), min_size=1),
)
@example(Case("batch_norm", (4, 3, 5)), {"y", "mean"})
@example(Case("batch_norm", (4, 3, 5)), {"y", "var"})
def test_whichever_results_are_used_the_gradient_is_the_formulas(case, used):
    results = []
    for choice in (EVERYWHERE, "eager"):
        x = values(case.shape, 0).requires_grad_()
        with chosen(choice):
            found = functional.normalize(x, case.view, eps=0.1, **case.kind)
            loss = 0 * x.sum()
            for name, t in zip(("y", "mean", "var"), found, strict=True):
                if name in used:
                    loss = loss + (t * values(t.shape, 3)).sum()
            results.append(torch.autograd.grad(loss, x))
    assert_close(*results)


@settings(deadline=None, max_examples=50)
@given(case=cases())
def test_the_gradients_of_the_moments_are_those_of_the_definitions(case):
    axes = stat_axes(case.kind["over_batch"])
    count = case.view.count(case.kind["over_batch"])
    x = values(case.shape, 0).requires_grad_()
    x4 = x.detach().reshape(case.view)
    centered = case.kind["centered"]
    _, _, var = functional.normalize(x, case.view, **case.kind)
    shape = x4.sum(axes, keepdim=True).shape
    dvar = values(shape, 3)
    (dx,) = torch.autograd.grad(var, x, dvar.reshape(var.shape))
    middle = x4.mean(axes, keepdim=True) if centered else 0
    expected = 2 / count * dvar * (x4 - middle)
    assert_close(dx, expected.reshape(x.shape))
    if centered:
        _, mean, _ = functional.normalize(x, case.view, **case.kind)
        (dx,) = torch.autograd.grad(mean, x, dvar.reshape(mean.shape))
        expected = (dvar / count).expand(case.view)
        assert_close(dx, expected.reshape(x.shape))


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_is_among_the_cases(norm):
    """The strategy reaches each, or else the facts above say nothing."""
    from hypothesis import find

    assert find(cases(), lambda case: case.norm == norm).norm == norm
