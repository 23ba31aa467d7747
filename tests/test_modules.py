"""Each layer is a drop-in for its namesake in the installed torch.nn.

Here: its surface, its arithmetic, its memory formats and its errors. What
else people do to a layer is in test_drop_in.py.
"""

import copy
import inspect

import pytest
import torch
from devices import over_devices
from torch.utils.checkpoint import checkpoint
from twins import (
    DTYPES,
    EVERYWHERE,
    FULL,
    LAYERS,
    NAMES,
    REFUSAL,
    TWINS,
    Twin,
    assert_same,
    chosen,
    outcome,
    over,
    strides,
    where,
    with_backends,
)

import normlib
from normlib import backends
from normlib.testing import assert_close

RUNNING = where(lambda twin: twin.tracks)
IMAGES = where(lambda twin: len(twin.shape) in (4, 5) and not twin.single)

pytestmark = pytest.mark.filterwarnings(
    "ignore:Mismatch dtype between input and weight"
)

BATCH = LAYERS["BatchNorm1d"]

CHOSEN = ("default", EVERYWHERE)


def refusals(modules, call):
    """What ours and torch's say in refusing; of the same type."""
    ours, theirs = modules
    with pytest.raises(Exception) as expected:  # noqa: PT011
        call(theirs)
    with pytest.raises(expected.type) as received:
        call(ours)
    return str(received.value), str(expected.value)


def assert_same_or_refused(modules, call):
    """Ours makes what torch makes of a call, or raises what torch raises.

    What breaks two rules at once a forced backend may refuse by either; and
    whoever refuses leaves every buffer as it was. Says whether it was refused.
    """
    ours, theirs = modules
    before = copy.deepcopy(ours.state_dict())
    try:
        expected = call(theirs)
    except Exception as error:
        forced = backends._forced is not None
        types = (ValueError, RuntimeError) if forced else type(error)
        with pytest.raises(types) as received:
            call(ours)
        assert REFUSAL not in str(received.value)
        for key, value in ours.state_dict().items():
            assert torch.equal(value, before[key]), key
        return True
    assert_same(call(ours), expected, laid_out=0)
    return False


# The surface: constructor, repr, state.


@pytest.mark.parametrize("name", NAMES)
def test_signature_and_defaults(name):
    ours = inspect.signature(getattr(normlib, name)).parameters
    theirs = inspect.signature(getattr(torch.nn, name)).parameters
    for key, parameter in theirs.items():
        assert ours[key].default == parameter.default
        assert ours[key].kind == parameter.kind
    shared = [key for key in ours if key in theirs]
    assert shared == list(theirs)
    assert set(ours) - set(theirs) <= {"bias"}


@pytest.mark.parametrize("name", NAMES)
def test_the_input_is_named_as_in_torch(name):
    ours, theirs = (
        list(inspect.signature(getattr(lib, name).forward).parameters)
        for lib in (normlib, torch.nn)
    )
    assert ours == theirs


@over(TWINS)
def test_repr(twin):
    ours, theirs = twin.pair()
    assert repr(ours) == repr(theirs)


@over(LAYERS)
def test_repr_follows_the_attributes(twin):
    ours, theirs = twin.pair()
    for module in (ours, theirs):
        for key in theirs.__constants__:
            setattr(module, key, 7)
    assert repr(ours) == repr(theirs)


@over(TWINS)
def test_the_attributes_are_torchs(twin):
    ours, theirs = twin.pair()
    for key, value in vars(theirs).items():
        if not key.startswith("_"):
            assert getattr(ours, key) == value, key


@over(TWINS)
def test_fresh_state_is_torchs(twin):
    ours, theirs = twin.make(normlib), twin.make(torch.nn)
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, expected[key])
        assert value.dtype == expected[key].dtype
    names = [key for key, _ in theirs.named_parameters()]
    assert [key for key, _ in ours.named_parameters()] == names
    names = [key for key, _ in theirs.named_buffers()]
    assert [key for key, _ in ours.named_buffers()] == names


@over(TWINS)
def test_reset_gives_the_fresh_state_back(twin):
    ours, _ = twin.pair()
    ours(twin.draw())
    ours.reset_parameters()
    fresh = twin.make(normlib).state_dict()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, fresh[key])


@over(TWINS)
def test_state_goes_both_ways(twin):
    ours, theirs = twin.pair()
    ours(twin.draw())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key])
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata


@over(LAYERS)
def test_a_missing_key_is_reported_as_torch_does(twin):
    for key in twin.make(torch.nn).state_dict():
        pair = twin.pair()
        state = pair[1].state_dict()
        del state[key]
        ours, theirs = refusals(pair, lambda m: m.load_state_dict(state))  # noqa: B023
        assert ours == theirs


@over(RUNNING)
@pytest.mark.parametrize("version", [None, 1])
def test_a_checkpoint_of_version_one_has_no_counter(twin, version):
    ours, theirs = (torch.nn.Sequential(m) for m in twin.pair())
    state = theirs.state_dict()
    del state["0.num_batches_tracked"]
    if version is None:
        del state._metadata
    else:
        state._metadata["0"]["version"] = version
    for module in (ours, theirs):
        module(twin.draw())
        module.load_state_dict(state, strict=True)
    assert ours[0].num_batches_tracked == theirs[0].num_batches_tracked
    assert ours[0].num_batches_tracked.dtype == torch.long


@over(TWINS)
def test_a_checkpoint_without_a_version_is_read(twin):
    ours, theirs = twin.pair()
    state = theirs.state_dict()
    del state._metadata
    fresh = twin.make(normlib)
    fresh.load_state_dict(state, strict=True)
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key])


@pytest.mark.parametrize("name", ["InstanceNorm1d", "InstanceNorm3d"])
@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("stale", ["running_mean", "running_var", None])
def test_statistics_that_old_instance_norms_wrote(name, versioned, stale):
    """Before torch 0.4 every instance norm had them; they are not dropped."""
    full = getattr(torch.nn, name)(3, affine=True, track_running_stats=True)
    state = torch.nn.Sequential(full).state_dict()
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        if stale not in (None, key):
            del state["0." + key]
    if not versioned:
        del state._metadata
    pair = [
        torch.nn.Sequential(getattr(lib, name)(3, affine=True))
        for lib in (normlib, torch.nn)
    ]
    copies = [state.copy() for _ in pair]
    for one, other in zip(copies, (state, state), strict=True):
        if versioned:
            one._metadata = other._metadata
    load = dict(zip(pair, copies, strict=True))
    ours, theirs = refusals(pair, lambda m: m.load_state_dict(load[m]))
    for key in ("running_mean", "running_var"):
        assert (key in ours) == (key in theirs)
    assert ("track_running_stats=True" in ours) == (not versioned)
    assert list(copies[0]) == list(copies[1])


SIZES = [-1, 2.5, "3", None, True, torch.tensor(3), (2, 3), [], (2, -3), 0]


@pytest.mark.parametrize("size", SIZES, ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_a_size_makes_what_torch_makes_of_it(name, size):
    """The layer that it makes, or the error."""
    args = (1, size) if name == "GroupNorm" else (size,)
    try:
        theirs = getattr(torch.nn, name)(*args)
    except Exception as error:
        with pytest.raises(type(error)):
            getattr(normlib, name)(*args)
    else:
        ours = getattr(normlib, name)(*args)
        assert repr(ours) == repr(theirs)
        shapes = [[p.shape for p in m.parameters()] for m in (ours, theirs)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("groups", [4, 7, 0, -2, 2.5])
def test_groups_that_do_not_divide_the_channels(groups):
    """torch divides by 0, and takes -2 until something comes in."""
    with pytest.raises(ValueError, match=rf"num_groups={groups}"):
        normlib.GroupNorm(groups, 6)


# The arithmetic.


@over_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over(TWINS)
@with_backends()
def test_three_steps_then_evaluation(twin, dtype, device):
    ours, theirs = twin.pair(device=device, dtype=dtype)
    for step in range(3):
        x = twin.draw(step, dtype, device)
        dy = twin.draw(10 + step, dtype, device)
        ours.train()
        theirs.train()
        buffers = list(ours.buffers())
        assert_same(outcome(ours, x, dy), outcome(theirs, x, dy))
        for before, after in zip(buffers, ours.buffers(), strict=True):
            assert before is after  # moved in place
        ours.eval()
        theirs.eval()
        assert_same(outcome(ours, x, dy), outcome(theirs, x, dy))


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@over(LAYERS)
@with_backends()
def test_sixteen_bit_input_with_float32_parameters(twin, dtype):
    ours, theirs = twin.pair()
    x, dy = twin.draw(0, dtype), twin.draw(1, dtype)
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        wide = torch.float32 if "RMS" in twin.name else dtype  # promotes
        a, b = (outcome(m, x, dy.to(wide)) for m in (ours, theirs))
        assert_same(a, b, 1e-2)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("choice", [EVERYWHERE, "cpu"])
@over(TWINS)
def test_the_fast_path_is_taken_once_each_way(twin, choice, dtype):
    """Which says that backend "cpu", forced, refuses none of these."""
    ours, _ = twin.pair(dtype=dtype)
    with chosen(choice) as taken:
        outcome(ours, twin.draw(0, dtype), twin.draw(1, dtype))
        assert taken == ["forward", "backward"]
        taken.clear()
        with torch.no_grad():
            ours(twin.draw(0, dtype))
        assert taken == ["forward"]


@over(LAYERS)
def test_a_small_call_is_torchs_own(twin):
    ours, theirs = twin.pair()
    x = twin.draw()
    with chosen("default") as taken:
        assert torch.equal(ours(x), theirs(x))
    assert not taken


LARGE = {
    "BatchNorm2d": Twin("BatchNorm2d", (32,), (8, 32, 64, 64)),
    "InstanceNorm2d": Twin("InstanceNorm2d", (32,), (8, 32, 64, 64), FULL),
    "RMSNorm": Twin("RMSNorm", (512,), (4, 512, 512)),
}
"""A million values, where the fast paths pay by a wide margin."""


@over(LARGE)
def test_a_large_call_takes_the_fast_path_by_itself(twin):
    ours, theirs = twin.pair()
    x, dy = twin.draw(), twin.draw(1)
    with chosen("default") as taken:
        a = outcome(ours, x, dy)
        assert taken == ["forward", "backward"]
        taken.clear()
        if twin.tracks:  # evaluation is torch's own
            ours.eval()(x)
            assert not taken
    assert_same(a, outcome(theirs, x, dy), 1e-4)


@over(RUNNING)
@pytest.mark.parametrize("training", [True, False])
@with_backends()
def test_tracking_switched_off_after_construction(twin, training):
    pair = twin.pair()
    x, dy = twin.draw(), twin.draw(1)
    for module in pair:
        module.track_running_stats = False
        module.train(training)
    assert_same(*(outcome(module, x, dy) for module in pair))


@over(RUNNING)
@pytest.mark.parametrize("momentum", [0.1, None])
@with_backends()
def test_statistics_taken_away_after_construction(twin, momentum):
    pair = twin.pair()
    x, dy = twin.draw(), twin.draw(1)
    for module in pair:
        module.momentum = momentum
        module.running_mean = module.running_var = None
    assert_same(*(outcome(module, x, dy) for module in pair))
    for module in pair:
        module.eval()
    if "Instance" in twin.name:
        refusals(pair, lambda module: module(x))
    else:
        assert_same(*(outcome(module, x, dy) for module in pair))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over(LAYERS)
@with_backends()
def test_eps_shows_where_the_input_is_small(twin, dtype):
    """RMS norm's depends on the dtype of the arithmetic, and is small."""
    scale = 1e-3 if "RMS" in twin.name else 1e-2
    x = twin.draw(0, dtype) * scale
    ours, theirs = twin.pair(dtype=dtype)
    assert_same([ours(x)], [theirs(x)])


@pytest.mark.parametrize("momentum", [1.0, None])
@pytest.mark.parametrize("scale", [1e-4, 1e4])
@with_backends()
def test_a_first_batch_far_from_variance_one_is_not_lost(momentum, scale):
    """The old variance of 1 must leave no rounding error behind."""
    ours, theirs = (
        lib.BatchNorm1d(3, momentum=momentum, eps=1e-12)
        for lib in (normlib, torch.nn)
    )
    x = BATCH.draw(shape=(50, 3, 2)) * scale
    ours(x)
    theirs(x)
    assert_close(ours.running_var, theirs.running_var, floor=0.0)
    assert_close(ours.running_mean, theirs.running_mean, floor=0.0)
    with backends.use_backend("eager"):
        assert_close(ours.eval()(x), theirs.eval()(x))


@over(LAYERS)
@pytest.mark.parametrize("training", [True, False])
@with_backends()
def test_frozen_parameters(twin, training):
    """One at a time: the others still get their gradients."""
    for name, _ in twin.make(torch.nn).named_parameters():
        ours, theirs = twin.pair()
        for module in (ours, theirs):
            module.train(training)
            module.get_parameter(name).requires_grad_(False)
        x, dy = twin.draw(), twin.draw(1)
        assert_same(outcome(ours, x, dy), outcome(theirs, x, dy))


@over(LAYERS)
@pytest.mark.parametrize("training", [True, False])
@with_backends()
def test_an_input_that_needs_no_gradient(twin, training):
    """As the first layer of a network has it."""
    results = []
    for module in twin.pair():
        module.train(training)
        y = module(twin.draw())
        leaves = list(module.parameters())
        results.append(torch.autograd.grad(y, leaves, twin.draw(1)))
    assert_same(*results)


@over(LAYERS)
@with_backends()
def test_the_arguments_are_not_changed(twin):
    ours, _ = twin.pair()
    x, dy = twin.draw(), twin.draw(1)
    tensors = [x, dy, *ours.parameters()]
    before = [t.detach().clone() for t in tensors]
    outcome(ours, x, dy)
    assert all(map(torch.equal, before, tensors))


@over(RUNNING)
@with_backends(*CHOSEN, "eager")
def test_statistics_carry_no_graph(twin):
    ours, _ = twin.pair()
    x = twin.draw().requires_grad_()
    ours(x).sum().backward()
    ours(x)
    assert not ours.running_mean.requires_grad
    assert ours.running_mean.grad_fn is None


@over(RUNNING)
@with_backends(*CHOSEN, "eager")
def test_an_evaluation_graph_survives_a_training_step(twin):
    """Its gradient is that of the statistics it was made with.

    torch.nn's backward reads the running statistics again, and so gives the
    gradient of another function where they have moved in between.
    """
    gradients = []
    for interrupted in (False, True):
        ours, _ = twin.pair()
        x = twin.draw().requires_grad_()
        y = ours.eval()(x)
        if interrupted:
            ours.train()(twin.draw(1))
        leaves = [x, *ours.parameters()]
        gradients.append(torch.autograd.grad(y, leaves, twin.draw(2)))
    assert_close(*gradients, tolerance=0.0)


@pytest.mark.parametrize("rank", [2, 3, 4, 5, 6])
@with_backends()
def test_batch_norm_of_any_rank_is_torchs_of_the_flattened(rank):
    shape = (4, 3, *range(2, rank))
    ours = normlib.BatchNorm(3)
    theirs = torch.nn.BatchNorm1d(3)
    x = BATCH.draw(shape=shape)
    expected = theirs(x.flatten(2)).reshape(shape) if rank > 2 else theirs(x)
    assert_close(ours(x), expected)
    assert_close(list(ours.buffers()), list(theirs.buffers()))


@pytest.mark.parametrize("rank", [2, 3, 4, 5, 6])
@with_backends()
def test_group_norm_takes_any_rank(rank):
    pair = LAYERS["GroupNorm"].pair()
    shape = (4, 6, *range(2, rank))
    x, dy = (BATCH.draw(seed, shape=shape) for seed in (0, 1))
    assert_same(*(outcome(module, x, dy) for module in pair))


# Memory formats.


def assert_laid_out(ours, theirs, x):
    """As in torch; or as x, where torch gives the channels' layout up.

    torch's instance norm does so on the CPU, and ours need not. The formula
    does so too over trailing axes, where that layout says nothing.
    """
    allowed = [strides(theirs), strides(x)]
    if backends._forced == "eager":
        allowed.append(strides(torch.empty(x.shape)))
    assert strides(ours) in allowed


@over(IMAGES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last", ["both", "x", "dy"])
@with_backends()
def test_channels_last(twin, training, last):
    """Any mixture of layouts is read right.

    torch.nn gets a contiguous dy: its own instance norm takes another one
    for what it is not where there is one instance.
    """
    ours, theirs = (m.train(training) for m in twin.pair())
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = formats[len(twin.shape)]
    x, dy = twin.draw(), twin.draw(1)
    if last != "dy":
        x = x.to(memory_format=memory_format)
    if last != "x":
        dy = dy.to(memory_format=memory_format)
    a, b = outcome(ours, x, dy), outcome(theirs, x, dy.contiguous())
    assert_same(a, b, laid_out=0)
    assert_laid_out(a[0], b[0], x)


@pytest.mark.parametrize("name", ["BatchNorm2d", "GroupNorm"])
@with_backends()
def test_channels_last_of_a_single_position(name):
    """Both formats at once: the stride of a size of 1 says nothing."""
    twin = LAYERS[name]
    shape = (*twin.shape[:2], 1, 1)
    x, dy = (twin.draw(seed, shape=shape) for seed in (0, 1))
    x = x.to(memory_format=torch.channels_last)
    assert_same(*(outcome(module, x, dy) for module in twin.pair()))


ODD = {
    "transposed": lambda f, s: f((*s[:-2], s[-1], s[-2])).transpose(-1, -2),
    "strided": lambda f, s: f((*s[:-1], 2 * s[-1]))[..., ::2],
    "expanded": lambda f, s: f((1, *s[1:])).expand(s),
    "slice": lambda f, s: f((s[0], s[1] + 2, *s[2:]))[:, 1:-1],
    "batch last": lambda f, s: f((*s[1:], s[0])).movedim(-1, 0),
    "features last": lambda f, s: f((s[0], *s[2:], s[1])).movedim(-1, 1),
    "offset": lambda f, s: f((2, *s))[1],
}


@over(where(lambda twin: len(twin.shape) > 1))
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
@with_backends()
def test_any_strides_give_torchs_values(twin, odd):
    """The output's layout is torch's too: ``y.view`` goes where it went."""
    dtype = torch.float64  # an expanded batch has variance zero

    def draw(seed):
        return odd(
            lambda shape: twin.draw(seed, dtype, shape=shape), twin.shape
        )

    x, dy = draw(0), draw(1)
    pair = twin.pair(dtype=dtype)
    for training in (True, False):
        for module in pair:
            module.train(training)
        a = outcome(pair[0], x, dy)
        b = outcome(pair[1], x, dy.contiguous())
        assert_same(a, b, laid_out=0)
        assert_laid_out(a[0], b[0], x)


@over(LAYERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@with_backends()
def test_the_output_is_the_callers_to_change_in_place(twin, training, dtype):
    """No view: ``out += skip`` must work wherever torch.nn's output does."""
    x, skip = (twin.draw(seed, dtype) for seed in (0, 1))
    pair = [m.train(training) for m in twin.pair(dtype=dtype)]
    ours, theirs = (module(x)._is_view() for module in pair)
    assert ours <= theirs
    results = []
    for module in pair:
        leaf = x.clone().requires_grad_()
        plain = module(leaf)
        plain.add_(skip).relu_()
        (dx,) = torch.autograd.grad(plain, leaf, skip)
        with torch.no_grad():
            frozen = module(x).mul_(2)
        results.append([plain, dx, frozen])
        if not theirs:
            out = checkpoint(module, leaf, use_reentrant=True)
            out += skip
            out.relu_().backward(skip)
            results[-1] += [out, leaf.grad]
    assert_same(*results, laid_out=0)


# Errors, and what they leave behind.

WRONG = {
    "no axes": (),
    "one axis": (3,),
    "two axes": (3, 4),
    "three axes": (2, 3, 4),
    "four axes": (2, 3, 4, 5),
    "five axes": (2, 3, 4, 5, 2),
    "six axes": (2, 3, 4, 5, 2, 2),
    "too many channels": (4, 5, 2, 2),
    "one channel": (4, 1, 2, 2),
    "one value": (1, 3, 1, 1),
    "one position": (2, 3, 1),
    "one image of one position": (3, 1, 1),
    "groups of one value": (1, 6, 1, 1),
    "other last axis": (2, 3, 6),
    "last axis of one": (2, 3, 1),
}


@over(LAYERS)
@pytest.mark.parametrize("momentum", [0.1, None])
@with_backends()
def test_a_failed_call_leaves_every_buffer_as_it_was(twin, momentum):
    refused = 0
    for shape in WRONG.values():
        pair = twin.pair()
        for module in pair:
            module.momentum = momentum
        x = twin.draw(shape=shape)
        refused += assert_same_or_refused(pair, lambda m: [m(x)])  # noqa: B023
    assert refused > 2


@over(LAYERS)
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.float64], ids=str
)
@pytest.mark.parametrize("training", [True, False])
@with_backends()
def test_an_input_of_another_dtype(twin, dtype, training):
    pair = [m.train(training) for m in twin.pair()]
    x = twin.draw().abs().to(dtype)
    assert_same_or_refused(pair, lambda module: [module(x)])


@over(LAYERS)
@with_backends(*CHOSEN)
def test_complex_values_are_torchs_to_take_or_refuse(twin):
    pair = twin.pair()
    x = twin.draw().to(torch.complex64)

    assert_same_or_refused(pair, lambda m: [torch.view_as_real(m(x))])


@pytest.mark.parametrize(
    "x", [None, 1.0, [[1.0, 2.0, 3.0]], "image"], ids=repr
)
@over(LAYERS)
@with_backends(*CHOSEN)
def test_what_is_no_tensor_at_all(twin, x):
    refusals(twin.pair(), lambda module: module(x))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("BatchNorm1d", (3,), r"expected 2D or 3D input \(got 1D input\)"),
        ("BatchNorm2d", (3, 4), r"expected 4D input \(got 2D input\).*3, 4"),
        ("BatchNorm3d", (3,) * 4, r"expected 5D input \(got 4D input\)"),
        ("BatchNorm", (3,), r"at least 2D input \(got 1D input\)"),
        ("InstanceNorm1d", (3,), r"expected 2D or 3D input.*\(3,\)"),
        ("InstanceNorm2d", (3, 4), r"expected 3D or 4D input \(got 2D"),
        ("InstanceNorm3d", (3, 4), r"expected 4D or 5D input \(got 2D"),
    ],
)
def test_a_wrong_rank_is_named_with_what_is_taken(name, shape, message):
    with pytest.raises(ValueError, match=message):
        getattr(normlib, name)(3)(torch.ones(shape))


@pytest.mark.parametrize(
    ("twin", "shape", "message"),
    [
        ("InstanceNorm1d", (2, 4, 5), r"num_features \(3\).*got: 4"),
        ("GroupNorm", (2, 9, 4), r"9.*num_groups=2"),
        ("GroupNorm", (2, 4, 4), r"weight.*\(4,\), got \(6,\)"),
        ("LayerNorm", (2, 6), r"normalized_shape=\(5,\).*\(2, 6\)"),
        ("RMSNorm image", (3, 5, 4), r"\(3, 5, 2\).*\(3, 5, 4\)"),
    ],
)
@with_backends(*CHOSEN, "eager")
def test_errors_carry_the_rule_and_the_received_values(twin, shape, message):
    ours, _ = LAYERS[twin].pair()
    with pytest.raises((ValueError, RuntimeError), match=message):
        ours(torch.ones(shape))


@pytest.mark.parametrize("name", ["InstanceNorm1d", "InstanceNorm1d single"])
@with_backends(*CHOSEN, "eager")
def test_other_channels_without_affine_are_warned_of(name):
    twin = LAYERS[name]._replace(config={})
    x = twin.draw(shape=(*twin.shape[:-2], 4, 5))
    results = []
    for module in twin.pair():
        with pytest.warns(UserWarning, match="size at dim") as caught:
            results.append(module(x))
        assert len(caught) == 1
    assert_same(*zip(results, strict=True))


@over(LAYERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@with_backends(*CHOSEN)
def test_empty_batches(twin, training, momentum):
    """Where torch takes them, they count and move nothing."""
    for axis in range(len(twin.shape)):
        shape = list(twin.shape)
        shape[axis] = 0
        pair = [m.train(training) for m in twin.pair()]
        for module in pair:
            module.momentum = momentum
        x = torch.empty(shape)
        assert_same_or_refused(pair, lambda m: outcome(m, x, x))  # noqa: B023


@over(where(lambda twin: not twin.single))
def test_the_formula_takes_empty_batches_too(twin):
    """Also where torch refuses them; and no gradient is NaN, as there."""
    last = len(twin.shape) - 1
    for axis in {0, last if last > 1 and twin.tracks else 0}:
        shape = list(twin.shape)
        shape[axis] = 0
        ours, _ = twin.pair()
        x = torch.empty(shape)
        with chosen("eager"):
            y, dx, *rest = outcome(ours, x, x)
        assert y.shape == dx.shape == x.shape
        assert all(t.isfinite().all() for t in rest)


@over(LAYERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("training", [True, False])
@with_backends()
def test_one_bad_value_spoils_what_it_spoils_in_torch(twin, bad, training):
    pair = [m.train(training) for m in twin.pair()]
    x, dy = twin.draw(), twin.draw(1)
    x.view(-1)[3] = bad
    a, b = (outcome(module, x, dy) for module in pair)
    assert_same(a, b)
    assert not a[0].isfinite().all()
