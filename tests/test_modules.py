"""Each layer is a drop-in for its namesake in the installed torch.nn."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from devices import DEVICES
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import normlib
from normlib.testing import assert_close

LAYERS = {
    "BatchNorm1d dense": ("BatchNorm1d", (6, 3)),
    "BatchNorm1d signal": ("BatchNorm1d", (2, 3, 5)),
    "BatchNorm2d": ("BatchNorm2d", (4, 3, 5, 2)),
    "BatchNorm3d": ("BatchNorm3d", (2, 3, 2, 3, 4)),
}
CONFIGS = {
    "defaults": {},
    "eps": {"eps": 0.3},
    "momentum 1": {"momentum": 1.0},
    "momentum 0": {"momentum": 0.0},
    "cumulative": {"momentum": None},
    "no affine": {"affine": False},
    "no bias": {"bias": False},
    "no running statistics": {"track_running_stats": False},
    "bare": {"affine": False, "track_running_stats": False},
}
if "bias" not in inspect.signature(torch.nn.BatchNorm1d).parameters:
    CONFIGS.pop("no bias")


@pytest.fixture(params=LAYERS.values(), ids=LAYERS.keys())
def layer(request):
    return request.param


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


def pair(name, device="cpu", **kwargs):
    """Our layer and torch's with the same, random, state."""
    kwargs |= {"device": device}
    theirs = getattr(torch.nn, name)(3, **kwargs)
    ours = getattr(normlib, name)(3, **kwargs)
    with torch.no_grad():
        for i, p in enumerate(theirs.parameters()):
            p.copy_(torch.linspace(-1.5, 2.0 + i, 3))
        if theirs.running_mean is not None:
            theirs.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
            theirs.running_var.copy_(torch.tensor([0.3, 1.0, 4.0]))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def draw(shape, seed=0, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64) * 2 + 1
    return x.to(device, dtype)


def assert_same(actual, expected, tolerance=None):
    """As close as the dtype allows, and of one dtype and layout."""
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.is_contiguous() == b.is_contiguous()
        assert_close(a, b, tolerance=tolerance)


def outcome(module, x, dy):
    """Everything that a step with this module makes."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(dy)
    gradients = [p.grad for p in module.parameters()]
    return [y, x.grad, *gradients, *module.buffers()]


# The surface: constructor, repr, state.


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_signature_and_defaults(name):
    ours = inspect.signature(getattr(normlib, name)).parameters
    theirs = inspect.signature(getattr(torch.nn, name)).parameters
    for key, parameter in theirs.items():
        assert ours[key].default == parameter.default
        assert ours[key].kind == parameter.kind
    assert set(ours) - set(theirs) <= {"bias"}


def test_repr(layer, config):
    ours, theirs = pair(layer[0], **config)
    assert repr(ours) == repr(theirs)


def test_fresh_state_is_torchs(layer, config):
    ours = getattr(normlib, layer[0])(3, **config)
    theirs = getattr(torch.nn, layer[0])(3, **config)
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, expected[key])
        assert value.dtype == expected[key].dtype
    names = [key for key, _ in theirs.named_parameters()]
    assert [key for key, _ in ours.named_parameters()] == names


def test_state_goes_both_ways(layer, config):
    ours, theirs = pair(layer[0], **config)
    ours(draw(layer[1]))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_close(
        list(theirs.state_dict().values()), list(ours.state_dict().values())
    )


@pytest.mark.parametrize("version", [None, 1])
def test_a_checkpoint_of_version_one_has_no_counter(version):
    ours, theirs = (torch.nn.Sequential(m) for m in pair("BatchNorm1d"))
    state = theirs.state_dict()
    del state["0.num_batches_tracked"]
    if version is None:
        del state._metadata
    else:
        state._metadata["0"]["version"] = version
    ours(draw((6, 3)))
    ours.load_state_dict(state, strict=True)
    theirs(draw((6, 3)))
    theirs.load_state_dict(state, strict=True)
    assert ours[0].num_batches_tracked == theirs[0].num_batches_tracked
    assert ours[0].num_batches_tracked.dtype == torch.long


def test_the_state_says_its_version():
    ours, theirs = pair("BatchNorm1d")
    metadata = theirs.state_dict()._metadata
    assert ours.state_dict()._metadata == metadata


@pytest.mark.parametrize("key", ["running_mean", "num_batches_tracked"])
def test_a_missing_key_is_reported_as_torch_does(key):
    ours, theirs = pair("BatchNorm1d")
    state = theirs.state_dict()
    del state[key]
    messages = []
    for module in (ours, theirs):
        with pytest.raises(RuntimeError) as error:
            module.load_state_dict(state)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_repr_follows_the_attributes():
    ours, theirs = pair("BatchNorm1d")
    for module in (ours, theirs):
        module.affine = False
        module.track_running_stats = False
        module.num_features = 7
    assert repr(ours) == repr(theirs)


# The arithmetic.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    ids=str,
)
def test_three_steps_then_evaluation(layer, config, dtype, device):
    name, shape = layer
    ours, theirs = pair(name, device, **config, dtype=dtype)
    for step in range(3):
        x = draw(shape, step, dtype, device)
        dy = draw(shape, 10 + step, dtype, device)
        ours.train()
        theirs.train()
        counter = ours.num_batches_tracked
        assert_same(outcome(ours, x, dy), outcome(theirs, x, dy))
        assert ours.num_batches_tracked is counter  # moved in place
        ours.eval()
        theirs.eval()
        assert_same(outcome(ours, x, dy), outcome(theirs, x, dy))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_input_with_float32_parameters(layer, dtype):
    name, shape = layer
    ours, theirs = pair(name)
    x, dy = draw(shape, 0, dtype), draw(shape, 1, dtype)
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        assert_same(outcome(ours, x, dy), outcome(theirs, x, dy), 1e-2)


@pytest.mark.parametrize("training", [True, False])
def test_tracking_switched_off_after_construction(training):
    ours, theirs = pair("BatchNorm1d")
    x, dy = draw((6, 3)), draw((6, 3), 1)
    for module in (ours, theirs):
        module.track_running_stats = False
        module.train(training)
    assert_close(outcome(ours, x, dy), outcome(theirs, x, dy))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_taken_away_after_construction(momentum):
    ours, theirs = pair("BatchNorm1d", momentum=momentum)
    x, dy = draw((6, 3)), draw((6, 3), 1)
    for module in (ours, theirs):
        module.running_mean = module.running_var = None
    assert_same(outcome(ours, x, dy), outcome(theirs, x, dy))
    for module in (ours, theirs):
        module.eval()
    assert_same(outcome(ours, x, dy), outcome(theirs, x, dy))


@pytest.mark.parametrize("momentum", [1.0, None])
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_a_first_batch_far_from_variance_one_is_not_lost(momentum, scale):
    """The old variance of 1 must leave no rounding error behind."""
    ours, theirs = (
        lib.BatchNorm1d(3, momentum=momentum, eps=1e-12)
        for lib in (normlib, torch.nn)
    )
    x = draw((50, 3)) * scale
    ours(x)
    theirs(x)
    assert_close(ours.running_var, theirs.running_var, floor=0.0)
    assert_close(ours.running_mean, theirs.running_mean, floor=0.0)
    assert_close(ours.eval()(x), theirs.eval()(x))


def test_frozen_statistics_in_a_training_model():
    ours, theirs = pair("BatchNorm2d")
    x, dy = draw((4, 3, 5, 2)), draw((4, 3, 5, 2), 1)
    for module in (ours, theirs):
        module.eval()
        module.weight.requires_grad_(False)
    assert_close(outcome(ours, x, dy)[:2], outcome(theirs, x, dy)[:2])


def test_the_input_is_not_changed():
    ours, _ = pair("BatchNorm2d")
    x = draw((4, 3, 5, 2))
    before = x.clone()
    ours(x)
    assert torch.equal(x, before)


def test_statistics_carry_no_graph():
    ours, _ = pair("BatchNorm1d")
    x = draw((6, 3)).requires_grad_()
    ours(x).sum().backward()
    ours(x)
    assert not ours.running_mean.requires_grad
    assert ours.running_mean.grad_fn is None


def test_an_evaluation_graph_survives_a_training_step():
    """Its gradient is that of the statistics it was made with.

    torch.nn's backward reads the running statistics again, and so gives the
    gradient of another function where they have moved in between.
    """
    gradients = []
    for interrupted in (False, True):
        ours, _ = pair("BatchNorm1d")
        x = draw((6, 3)).requires_grad_()
        y = ours.eval()(x)
        if interrupted:
            ours.train()(draw((6, 3), 1))
        y.backward(draw((6, 3), 2))
        gradients.append([x.grad, *(p.grad for p in ours.parameters())])
    assert_close(*gradients, tolerance=0.0)


@pytest.mark.parametrize("rank", [2, 3, 4, 5, 6])
def test_batch_norm_of_any_rank_is_torchs_of_the_flattened(rank):
    shape = (4, 3, *range(2, rank))
    ours = normlib.BatchNorm(3)
    theirs = torch.nn.BatchNorm1d(3)
    x = draw(shape)
    expected = theirs(x.flatten(2)).reshape(shape) if rank > 2 else theirs(x)
    assert_close(ours(x), expected)
    assert_close(list(ours.buffers()), list(theirs.buffers()))


# Memory formats.


@pytest.mark.parametrize(
    ("name", "shape", "memory_format"),
    [
        ("BatchNorm2d", (4, 3, 5, 2), torch.channels_last),
        ("BatchNorm2d", (4, 3, 1, 1), torch.channels_last),
        ("BatchNorm3d", (2, 3, 4, 5, 2), torch.channels_last_3d),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_in_channels_last_out(
    name, shape, memory_format, training
):
    ours, theirs = (m.train(training) for m in pair(name))
    x = draw(shape).to(memory_format=memory_format)
    dy = draw(shape, 1).to(memory_format=memory_format)
    a, b = outcome(ours, x, dy), outcome(theirs, x, dy)
    assert_close(a, b)
    assert a[0].is_contiguous(memory_format=memory_format)
    for i in (0, 1):  # y and dx; the stride of a size of 1 says nothing
        strides = zip(shape, a[i].stride(), b[i].stride(), strict=True)
        assert all(s == t for size, s, t in strides if size > 1)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(2, 3),
        lambda x: x.flip(0)[:, :, ::2],
        lambda x: x[:1].expand(4, -1, -1, -1),
        lambda x: x.transpose(0, 1)[:3].transpose(0, 1),
        lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    ],
    ids=["transposed", "strided", "expanded", "channel slice", "batch last"],
)
def test_any_strides_give_torchs_values(view):
    ours, theirs = pair("BatchNorm2d")
    x, dy = view(draw((4, 3, 5, 6))), view(draw((4, 3, 5, 6), 1))
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        a, b = outcome(ours, x, dy), outcome(theirs, x, dy)
        assert_same(a[:1], b[:1])
        assert_close(a, b)


def test_a_sequence_with_features_last_comes_out_contiguous():
    for module in pair("BatchNorm1d"):
        y = module(draw((6, 5, 3)).transpose(1, 2))
        assert y.view(6, -1).shape == (6, 15)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_output_is_the_callers_to_change_in_place(training, dtype):
    """No view: ``out += skip`` must work wherever torch.nn's output does."""
    ours, theirs = (
        m.train(training) for m in pair("BatchNorm2d", dtype=dtype)
    )
    x, skip = (draw((4, 3, 5, 2), seed, dtype) for seed in (0, 1))
    results = []
    for module in (ours, theirs):
        assert not module(x)._is_view()
        leaf = x.clone().requires_grad_()
        out = checkpoint(module, leaf, use_reentrant=True)
        out += skip
        out.relu_().pow(2).sum().backward()
        with torch.no_grad():
            frozen = module(x)
        frozen.mul_(module.weight.reshape(3, 1, 1))
        results.append([out, leaf.grad, frozen])
    assert_same(*results)


# Errors, and what they leave behind.

WRONG = {
    "rank too low": (3, 4),
    "rank too high": (2, 3, 4, 5, 6),
    "too many channels": (4, 5, 2, 2),
    "too few channels": (4, 1, 2, 2),
    "one value": (1, 3, 1, 1),
}


@pytest.mark.parametrize("shape", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_failed_call_leaves_every_buffer_as_it_was(shape, momentum):
    ours, theirs = pair("BatchNorm2d", momentum=momentum)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises((ValueError, RuntimeError)) as expected:
        theirs(torch.ones(shape))
    with pytest.raises(expected.type, match=r"shape|size"):
        ours(torch.ones(shape))
    for key, value in ours.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("BatchNorm1d", (3,), r"expected 2D or 3D input \(got 1D input\)"),
        ("BatchNorm2d", (3, 4), r"expected 4D input \(got 2D input\).*3, 4"),
        ("BatchNorm3d", (3,) * 4, r"expected 5D input \(got 4D input\)"),
        ("BatchNorm", (3,), r"at least 2D input \(got 1D input\)"),
    ],
)
def test_a_wrong_rank_is_named_with_what_is_taken(name, shape, message):
    with pytest.raises(ValueError, match=message):
        getattr(normlib, name)(3)(torch.ones(shape))


@pytest.mark.parametrize("size", [-1, 2.5, "3"])
def test_a_bad_number_of_features_raises_what_torch_raises(size):
    with pytest.raises((RuntimeError, TypeError)) as expected:
        torch.nn.BatchNorm1d(size)
    with pytest.raises(expected.type):
        normlib.BatchNorm1d(size)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 3, 0, 2)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_counts_and_moves_nothing(shape, momentum):
    ours, theirs = pair("BatchNorm2d", momentum=momentum)
    x, dy = torch.empty(shape), torch.empty(shape)
    assert_close(outcome(ours, x, dy), outcome(theirs, x, dy))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_value_spoils_its_channel_as_in_torch(bad):
    ours, theirs = pair("BatchNorm1d")
    x, dy = draw((6, 3)), draw((6, 3), 1)
    x[2, 1] = bad
    assert_close(outcome(ours, x, dy), outcome(theirs, x, dy))


# Whatever else people do to a layer.


def test_second_derivatives(layer, config):
    results = []
    for module in pair(layer[0], **config, dtype=torch.float64):
        x = draw(layer[1], dtype=torch.float64).requires_grad_()
        leaves = [x, *module.parameters()]
        first = torch.autograd.grad(
            module(x),
            leaves,
            draw(layer[1], 1, torch.float64),
            create_graph=True,
        )
        penalty = sum(g.square().sum() for g in first)
        results.append(torch.autograd.grad(penalty, leaves, allow_unused=True))
    for a, b in zip(*results, strict=True):
        zero = torch.zeros(())
        assert_close(zero if a is None else a, zero if b is None else b)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("training", [True, False])
def test_functorch_transforms(training):
    config = {} if not training else {"track_running_stats": False}
    ours, theirs = (
        m.train(training)
        for m in pair("BatchNorm1d", dtype=torch.float64, **config)
    )
    x = draw((6, 3), dtype=torch.float64)
    dx = draw((6, 3), 1, torch.float64)

    def everything(module):
        state = dict(module.named_parameters())

        def loss(state, x):
            return functional_call(module, state, (x,)).pow(3).sum()

        return [
            *grad(loss)(state, x).values(),
            jacrev(module)(x),
            jvp(module, (x,), (dx,))[1],
            vmap(module)(torch.stack([x, dx, x - dx])),
            vmap(grad(lambda x: module(x).pow(3).sum()))(torch.stack([x, dx])),
        ]

    assert_close(everything(ours), everything(theirs))


def test_vmap_over_running_statistics_is_refused_not_silent():
    """One buffer cannot hold the statistics of many batches."""
    for module in pair("BatchNorm1d"):
        with pytest.raises((RuntimeError, ValueError)):
            vmap(module)(draw((2, 6, 3)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_without_a_graph_break(training, momentum):
    ours, theirs = (
        m.train(training) for m in pair("BatchNorm2d", momentum=momentum)
    )
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for seed, shape in enumerate([(4, 3, 5, 2), (4, 3, 5, 2), (7, 3, 4, 4)]):
        x, dy = draw(shape, seed), draw(shape, 9)
        assert_close(outcome(compiled, x, dy), outcome(theirs, x, dy))


@pytest.mark.parametrize("training", [True, False])
def test_exported_with_a_dynamic_batch(training):
    ours, theirs = (m.train(training) for m in pair("BatchNorm2d"))
    program = torch.export.export(
        ours,
        (draw((4, 3, 5, 2)),),
        dynamic_shapes=({0: torch.export.Dim("batch", min=2)},),
    )
    module = program.module()
    for n in (4, 9):
        x = draw((n, 3, 5, 2), n)
        assert_close(module(x), theirs(x))
    if training:
        assert_close(
            [b.float() for b in module.buffers()],
            [b.float() for b in theirs.buffers()],
        )


def test_pickled_copied_and_saved():
    ours, _ = pair("BatchNorm2d")
    x = draw((4, 3, 5, 2))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = [
        pickle.loads(pickle.dumps(ours)),
        copy.deepcopy(ours),
        torch.load(buffer, weights_only=False),
    ]
    expected = ours(x)
    for module in copies:
        assert_close(module(x), expected)
        assert_close(list(module.buffers()), list(ours.buffers()))


def test_on_the_meta_device_shapes_pass_and_nothing_is_computed():
    ours, theirs = (
        lib.BatchNorm2d(3, device="meta") for lib in (normlib, torch.nn)
    )
    x = torch.empty(4, 3, 5, 2, device="meta")
    for a, b in zip(
        (ours(x), *ours.state_dict().values()),
        (theirs(x), *theirs.state_dict().values()),
        strict=True,
    ):
        assert a.is_meta
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    real = ours.to_empty(device="cpu")
    real.reset_parameters()
    assert_close(
        real(draw((4, 3, 5, 2))), torch.nn.BatchNorm2d(3)(draw((4, 3, 5, 2)))
    )
    with torch.device("meta"):
        assert normlib.BatchNorm2d(3).running_var.is_meta


def test_moved_and_cast_with_its_model():
    model = torch.nn.Sequential(normlib.BatchNorm1d(3)).double()
    assert model[0].running_var.dtype == torch.float64
    assert model[0].num_batches_tracked.dtype == torch.long
    assert model(draw((6, 3), dtype=torch.float64)).dtype == torch.float64


def test_under_autocast_the_dtype_is_torchs():
    ours, theirs = pair("BatchNorm2d")
    conv = torch.nn.Conv2d(3, 3, 3)
    x = draw((4, 3, 5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(conv(x)), theirs(conv(x))
    assert a.dtype == b.dtype
    assert_close(a, b)


def test_it_serves_in_a_network_that_trains():
    """The same seed, the same data: the same losses, step after step."""
    losses = []
    for lib in (normlib, torch.nn):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3, bias=False),
            lib.BatchNorm2d(4),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(4 * 36, 5, bias=False),
            lib.BatchNorm1d(5),
        ).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        x = draw((16, 1, 8, 8), dtype=torch.float64)
        y = torch.arange(16) % 5
        steps = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        model.eval()
        losses.append([*steps, model(x).square().mean().item()])
    assert losses[0][9] < losses[0][0]
    assert_close(losses[0], losses[1])
