"""Folding: the same outputs from fewer layers, and reasons for the rest."""

import copy
import pickle
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from devices import over_devices
from hypothesis import given, settings
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import normlib
from normlib import models, variants
from normlib.folding import Folded, fold_batch_norm, plan_folding
from normlib.inference import freeze_batch_norm
from normlib.testing import assert_close

EXACT = 1e-10
"""Of the outputs in float64, as a share of the largest."""


def settled(model, dtype=torch.float64, seed=0):
    """In evaluation mode, with statistics and parameters that are not 1."""
    g = torch.Generator().manual_seed(seed)
    model = model.to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.5 + 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=g))
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=g) + 0.3)
    return model


def draw(*shape, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(dtype)


def assert_folded(model, *xs, left=0, example=None):
    """Check the copy against the model; return it, and the plan."""
    plan = plan_folding(model, example)
    assert len(plan.left) == left, plan
    folded = fold_batch_norm(model, example)
    kept = [
        name
        for name, module in folded.named_modules()
        if isinstance(module, normlib.modules.BATCH_NORMS)
    ]
    assert kept == list(plan.left)
    assert not any(module.training for module in folded.modules())
    with torch.no_grad():
        for x in xs:
            assert_close(folded(x), model(x), tolerance=EXACT)
    return folded, plan


def left(model, example=None):
    """Return the reason for the one batch norm of a model that is left."""
    plan = plan_folding(model, example)
    (reason,) = plan.left.values()
    return reason


LAYERS = {
    "linear": (nn.Linear(4, 6), (5, 4)),
    "conv 1d": (nn.Conv1d(4, 6, 3), (2, 4, 7)),
    "conv 2d": (nn.Conv2d(4, 6, 3), (2, 4, 7, 5)),
    "conv 3d": (nn.Conv3d(4, 6, 2), (2, 4, 3, 4, 3)),
    "no bias": (nn.Conv2d(4, 6, 3, bias=False), (2, 4, 7, 5)),
    "linear, no bias": (nn.Linear(4, 6, bias=False), (5, 4)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 5)),
    "depthwise": (nn.Conv1d(4, 8, 3, groups=4), (2, 4, 7)),
    "dilated": (nn.Conv2d(4, 6, 2, dilation=(1, 2)), (2, 4, 5, 6)),
    "stride": (nn.Conv2d(4, 6, 3, (2, 1), padding=1), (2, 4, 5, 6)),
    "circular": (
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        (2, 4, 5, 6),
    ),
    "reflect": (
        nn.Conv1d(4, 6, 3, padding="same", padding_mode="reflect"),
        (2, 4, 5),
    ),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
    "transposed 2d": (
        nn.ConvTranspose2d(4, 6, 3, 2, output_padding=1, bias=False),
        (2, 4, 3, 3),
    ),
    "transposed 3d": (nn.ConvTranspose3d(4, 6, 2), (2, 4, 2, 3, 2)),
    "transposed, groups": (
        nn.ConvTranspose2d(4, 6, (3, 2), groups=2),
        (2, 4, 3, 3),
    ),
    "transposed, depthwise": (
        nn.ConvTranspose1d(4, 8, 3, 2, groups=4, dilation=2),
        (2, 4, 5),
    ),
}
NORMS = {
    "": {},
    "no affine": {"affine": False},
    "eps": {"eps": 0.3},
    "no norm bias": {"bias": False},
}


def channels(layer):
    return getattr(layer, "out_channels", None) or layer.out_features


def norms(rank):
    """The classes of batch norm that take an input of this rank."""
    name = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d"}
    name = name.get(rank, "BatchNorm3d")
    ours, theirs = getattr(normlib, name), getattr(nn, name)
    return [ours, normlib.BatchNorm, theirs]


@over_devices
@pytest.mark.parametrize("config", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_layer_and_batch_norm_are_one_layer(layer, shape, config, device):
    for norm in norms(len(shape)):
        if "bias" in config and norm.__module__.startswith("torch"):
            continue
        pair = nn.Sequential(copy.deepcopy(layer), norm(6, **config))
        if channels(layer) == 8:
            pair[1] = norm(8, **config)
        pair = settled(pair).to(device)
        folded, plan = assert_folded(pair, draw(*shape).to(device))
        assert plan.folded == {"1": "0"}
        assert isinstance(folded[1], Folded)
        assert type(folded[0]) is type(layer)
        assert folded[0].bias is not None


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_the_weights_are_those_of_torchs_own_fusion(layer, shape):
    norm = norms(len(shape))[-1](channels(layer))
    pair = settled(nn.Sequential(copy.deepcopy(layer), norm))
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        if layer.groups > 1:
            pytest.skip("torch's fusion does not know their groups")
        theirs = fuse_conv_bn_eval(*pair, transpose=True)
    elif isinstance(layer, nn.Linear):
        theirs = fuse_linear_bn_eval(*pair)
    else:
        theirs = fuse_conv_bn_eval(*pair)
    ours = fold_batch_norm(pair)[0]
    assert_close(ours.weight, theirs.weight, tolerance=EXACT)
    assert_close(ours.bias, theirs.bias, tolerance=EXACT)


@pytest.mark.parametrize(
    "norm",
    [
        variants.NoisyBatchNorm(6),
        variants.GhostBatchNorm(6),
        variants.LpBatchNorm(6),
        variants.BatchRenorm(6, r_max=3.0, d_max=5.0),
        nn.SyncBatchNorm(6),
        freeze_batch_norm(nn.Sequential(nn.BatchNorm2d(6)))[0],
        type("Mine", (nn.BatchNorm2d,), {})(6),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_norms_that_evaluate_as_batch_norm_does_are_folded(norm):
    pair = settled(nn.Sequential(nn.Conv2d(4, 6, 3), copy.deepcopy(norm)))
    assert_folded(pair, draw(2, 4, 5, 5))


# Found by what the model does


class Net(nn.Module):
    """Layers by name and a forward written as a function of them and x."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def conv(bias=False):
    return nn.Conv2d(4, 4, 3, padding=1, bias=bias)


def net(forward, **layers):
    """A model with two pairs, a.k.a. conv1, norm1, conv2, norm2."""
    ours = {"conv1": conv(), "norm1": normlib.BatchNorm2d(4)}
    theirs = {"conv2": conv(True), "norm2": nn.BatchNorm2d(4)}
    return settled(Net(forward, **{**ours, **theirs, **layers}))


X = draw(2, 4, 5, 5)


def residual(self, x):
    y = F.relu(self.norm1(self.conv1(x)))
    return F.relu(self.norm2(self.conv2(y)) + x)


def branches(self, x):
    both = [self.norm1(self.conv1(x)), self.norm2(self.conv2(x))]
    return torch.cat(both, 1).mean((2, 3))


def swapped(self, x):
    return self.norm1(self.conv2(x)) * self.norm2(self.conv1(x))


def asking(self, x):
    y = self.conv1(x)
    n, size, device = y.shape[0], y.size(), y.device
    assert y.dim() == 4
    y = self.norm1(input=y).view(n, -1).view(size).to(device, y.dtype)
    return self.norm2(self.conv2(y.to(self.conv1.weight.dtype)))


def deciding(self, x):
    if x.shape[1] != 4:
        raise ValueError("4 channels")
    if x.mean() > 0 and x.shape[0] > 1:
        return self.norm1(self.conv1(x))
    return self.norm2(self.conv2(x)) + 1


def repeated(self, x):
    for _ in range(2):
        x = self.norm1(self.conv1(x))
    return self.norm2(self.conv2(x))


FORWARDS = [residual, branches, swapped, asking, deciding, repeated]


@pytest.mark.parametrize("example", [None, X], ids=["traced", "run"])
@pytest.mark.parametrize("forward", FORWARDS)
def test_pairs_are_found_where_forward_calls_them(forward, example):
    _, plan = assert_folded(net(forward), X, -X, example=example)
    into = {"norm1": "conv1", "norm2": "conv2"}
    if forward is swapped:
        into = {"norm1": "conv2", "norm2": "conv1"}
    assert plan.folded == into


def test_pairs_are_found_in_containers_at_any_depth():
    model = models.resnet([4, 6], 2, norm=normlib.BatchNorm2d, channels=2)
    nested = nn.ModuleDict({"a": nn.ModuleList([nn.Identity(), model])})

    def forward(self, x):
        return self.parts["a"][1](x)

    _, plan = assert_folded(
        settled(Net(forward, parts=nested)), draw(2, 2, 6, 6)
    )
    assert len(plan.folded) == 10
    assert plan.folded["parts.a.1.5.shortcut.1"] == "parts.a.1.5.shortcut.0"


def test_a_network_of_linear_layers():
    model = models.mlp([4, 6, 5, 3], norm=normlib.BatchNorm1d)
    assert_folded(settled(model), draw(7, 4))


def test_a_layer_with_two_names_is_folded_under_both():
    def forward(self, x):
        return self.again[1](self.conv1(x))

    model = net(forward)
    model.again = nn.ModuleList([model.conv1, model.norm1])
    del model.conv2, model.norm2
    folded, _ = assert_folded(model.eval(), X)
    assert folded.again[0] is folded.conv1
    assert folded.again[1] is folded.norm1


def test_a_layer_that_is_also_in_a_plain_list_is_folded_there():
    def forward(self, x):
        for layer in self.order:
            x = layer(x)
        return x

    model = net(forward)
    model.order = [model.conv2, model.norm2, model.conv1, model.norm1]
    assert_folded(model, X)


def test_a_model_that_is_one_module_in_two_places():
    """Siamese: every call of the norm follows a call of the convolution."""
    twin = settled(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    model = Net(lambda self, x: self.a(x) - self.b(x + 1), a=twin, b=twin)
    assert_folded(model.eval(), X)


def test_a_wrapper_of_torch_is_looked_into():
    model = settled(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    assert_folded(nn.DataParallel(model).eval(), X)


class Skip(nn.Module):
    """A block whose optional argument comes between the pair."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(4)

    def forward(self, x, skip=None):
        y = self.conv(x)
        return self.norm(y if skip is None else y + skip)


def test_an_optional_argument_is_taken_to_be_given_too():
    assert "add()" in left(settled(Skip()))


def test_an_optional_argument_that_a_model_leaves_out_is_none():
    assert_folded(settled(nn.Sequential(Skip())), X)


STEPS = st.tuples(
    st.sampled_from(["conv", "norm", "norm", "relu", "add"]),
    st.integers(0, 1),  # which of two layers
    st.integers(1, 2),  # on the last value, or the one before
)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(STEPS, min_size=2, max_size=8), example=st.booleans())
def test_whatever_a_model_does_it_goes_on_doing(steps, example):
    """Layers in any order, used again, over values that are used again."""

    def forward(self, x):
        values = [x, x]
        for kind, which, back in steps:
            y = values[-back]
            if kind == "add":
                values.append(y + values[-1])
            elif kind == "relu":
                values.append(F.relu(y))
            else:
                values.append(getattr(self, kind)[which](y))
        return values[-1]

    convs = nn.ModuleList(nn.Conv1d(2, 2, 1) for _ in range(2))
    norms = nn.ModuleList(nn.BatchNorm1d(2) for _ in range(2))
    model = settled(Net(forward, conv=convs, norm=norms))
    x = draw(2, 2, 3)
    folded = fold_batch_norm(model, x if example else None)
    assert_close(folded(x), model(x), tolerance=EXACT)


# What is left, and why


def plus(self, x):
    y = self.conv1(x)
    return self.norm1(y) + y


def changed(self, x):
    y = self.conv1(x)
    y.mul_(2)
    return self.norm1(y)


def returned(self, x):
    y = self.conv1(x)
    return {"before": y, "after": [self.norm1(y)]}


def elsewhere(self, x):
    return self.norm1(self.conv1(x)) + self.conv1(x + 1)


def one_of_two(self, x):
    return self.norm1(self.conv1(x) if x.sum() > 0 else self.conv2(x))


def shown(self, x):
    y = self.conv1(x)
    return y if x.sum() > 1e9 else self.norm1(y)


def kept(self, x):
    self.last = {"before": (self.conv1(x),)}
    return self.norm1(self.last["before"][0])


class Pair(NamedTuple):
    before: torch.Tensor
    after: torch.Tensor


class Bag:
    def __init__(self, before):
        self.before = before


def in_a_tuple(self, x):
    y = self.conv1(x)
    return Pair(y, self.norm1(y))


REASONS = {
    "also goes to an attribute of the model": kept,
    "to Pair()": in_a_tuple,
    "also goes to add()": plus,
    "also goes to mul_()": changed,
    "also goes to the output": returned,
    "also goes to 'conv2' (Conv2d)": lambda self, x: (
        (y := self.conv1(x)),
        self.norm1(y) + self.conv2(y),
    )[1],
    "also goes to relu()": lambda self, x: (
        (y := self.conv1(x)),
        self.norm1(y) + F.relu(y),
    )[1],
    "its input comes from relu()": lambda self, x: self.norm1(
        F.relu(self.conv1(x))
    ),
    "its input comes from 'act' (ReLU)": lambda self, x: self.norm1(
        self.act(self.conv1(x))
    ),
    "its input comes from the input x": lambda self, x: self.conv1(
        self.norm1(x)
    ),
    "its input comes from conv2d()": lambda self, x: self.norm1(
        F.conv2d(x, self.conv1.weight, padding=1)
    ),
    "'conv1' has tensors that are used outside": lambda self, x: (
        self.norm1(self.conv1(x)) * self.conv1.weight.sum()
    ),
    "'conv1' has tensors that are used outside of it": lambda self, x: (
        self.norm1(self.conv1(x)) + x * self.conv1.weight[0, 0, 0, 0]
    ),
    "it has tensors that are used outside of it": lambda self, x: (
        self.norm1(self.conv1(x)) - self.norm1.running_mean.mean()
    ),
    "it is called nowhere that was looked at": lambda self, x: self.conv1(x),
    "also goes to getattr()": lambda self, x: (
        (y := self.conv1(x)),
        self.norm1(y) + y.data,
    )[1],
    "'conv1' also": elsewhere,
    "from 'conv1' (Conv2d) and from the input x": lambda self, x: (
        self.norm1(self.conv1(x)) + self.norm1(x)
    ),
    "from 'conv1' (Conv2d) and from 'conv2' (Conv2d)": one_of_two,
    "to the output": shown,
}


@pytest.mark.parametrize(("said", "forward"), REASONS.items(), ids=REASONS)
def test_what_is_left_is_named_with_its_reason(said, forward):
    plan = plan_folding(net(forward, act=nn.ReLU()))
    assert said in plan.left["norm1"]


@pytest.mark.parametrize(
    "forward", [f for f in REASONS.values() if f not in (one_of_two, shown)]
)
def test_it_is_also_left_where_only_a_run_can_tell(forward):
    def untraceable(self, x):
        assert range(len(x))
        return forward(self, x)

    model = net(untraceable, act=nn.ReLU())
    assert "cannot be traced" in plan_folding(model).left["norm1"]
    reason = plan_folding(model, X).left["norm1"]
    assert "cannot be traced" not in reason


def pair():
    return nn.Sequential(conv(), nn.BatchNorm2d(4))


class Scaled(nn.Conv2d):
    """A convolution with arithmetic of its own."""

    def forward(self, x):
        return super().forward(x) * 2


class Padded(nn.Conv2d):
    """The same, by a method that torch's forward calls."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x.abs(), weight, bias)


class Choosy(nn.Conv2d):
    """The same, deciding by values."""

    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)


class Doubled(nn.BatchNorm2d):
    """Batch norm with arithmetic of its own."""

    def forward(self, x):
        return F.batch_norm(x * 2, self.running_mean, self.running_var)


def with_hook(kind, i):
    def change(model):
        getattr(model[i], f"register_{kind}_hook")(lambda *args: None)

    return change


def shadowed(model):
    model[0].forward = lambda x: x


def biased(model):
    model[1].register_parameter("scale", nn.Parameter(torch.ones(4)))


def tied(model):
    model.append(nn.Sequential(nn.ReLU(), conv()))
    model[2][1].weight = model[0].weight


def put(i, module):
    def change(model):
        model[i] = module.eval()

    return change


CHANGES = {
    "it has no running statistics": put(
        1, nn.BatchNorm2d(4, track_running_stats=False)
    ),
    "it is in training mode": lambda model: model[1].train(),
    "'0' is parametrized": lambda model: variants.weight_norm(model[0]),
    "it has hooks": with_hook("forward", 1),
    "'0' has hooks": with_hook("forward_pre", 0),
    "'0' has hooks, backward": with_hook("full_backward", 0),
    "'0' shares parameters with '2.1'": tied,
    "comes from mul()": put(0, Scaled(4, 4, 3)),
    "comes from conv2d()": put(0, Padded(4, 4, 3)),
    "'0' has a forward of its own (Choosy)": put(0, Choosy(4, 4, 3)),
    "it has a forward of its own (Doubled)": put(1, Doubled(4)),
    "its input comes from the input": shadowed,
    "it has other parameters than weight and bias": biased,
    "it has no values yet": put(1, nn.BatchNorm2d(4, device="meta")),
    "'0' has no values yet": put(0, nn.Conv2d(4, 4, 3, device="meta")),
    "'0' has no values yet, lazy": put(0, nn.LazyConv2d(4, 3)),
    "'0' has 5 channels, not 4": put(0, nn.Conv2d(4, 5, 3)),
    "'0' has an output that is refused: expected 2D or 3D": put(
        1, nn.BatchNorm1d(4)
    ),
    "'0' has an output that is refused: expected 4D": put(0, nn.Linear(4, 4)),
    "'0' is of torch.float64, not of torch.float32": lambda model: model[
        1
    ].float(),
    "'0' is of torch.bfloat16, not of torch.float64": lambda model: model[
        0
    ].bfloat16(),
}


@pytest.mark.parametrize(("said", "change"), CHANGES.items(), ids=CHANGES)
def test_an_odd_layer_is_left_and_named(said, change):
    model = settled(pair())
    change(model)
    plan = plan_folding(model)
    assert said.partition(", ")[0] in plan.left["1"]
    assert not plan.folded


def test_a_weight_beyond_the_range_of_its_dtype_is_left():
    model = settled(pair())
    model[1].running_var.fill_(0)
    model[1].eps = 1e-12
    assert not plan_folding(model).left
    model.half()
    model[1].float()
    assert "weights that torch.float16 cannot hold" in left(model)


def test_a_model_in_training_mode_is_refused():
    model = pair()
    with pytest.raises(ValueError, match="Sequential is in training mode"):
        fold_batch_norm(model)
    model[1].eval()
    assert plan_folding(model).folded == {"1": "0"}


def test_the_plan_prints_as_a_report():
    plan = plan_folding(net(lambda self, x: self.norm1(self.conv1(x))))
    assert str(plan) == (
        "1 of 2 batch norms folded\n"
        "  norm1 into conv1\n"
        "  norm2 left: it is called nowhere that was looked at"
    )


# Linear layers: which axis is the features


def test_behind_a_linear_layer_only_rows_are_folded():
    """(N, L, C): batch norm reads L as its channels, even where L = C."""
    model = settled(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    tokens = draw(2, 4, 3)
    folded = fold_batch_norm(model)
    assert_close(folded(tokens[0]), model(tokens[0]), tolerance=EXACT)
    with pytest.raises(ValueError, match=r"expected 2D .*got 3D"):
        folded(tokens)
    _, plan = assert_folded(model, tokens, left=1, example=tokens)
    assert plan.left == {"1": "'0' has an output of 3 axes, not 2"}


def test_behind_a_convolution_only_batches_are_folded():
    """(C, L): batch norm reads C as the batch."""
    model = settled(nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)))
    signal = draw(3, 4)
    folded, _ = assert_folded(model, signal[None])
    with pytest.raises(ValueError, match=r"expected 3D .*got 2D"):
        folded(signal)
    assert_folded(model, signal, left=1, example=signal)


def test_features_that_are_moved_to_the_channels_are_left():
    def forward(self, x):
        return self.norm1(self.conv1(x).transpose(1, 2))

    model = net(forward, conv1=nn.Linear(4, 4), norm1=nn.BatchNorm1d(4))
    assert "transpose()" in plan_folding(model).left["norm1"]
    assert_folded(model, draw(2, 5, 4), left=2)


# Models that cannot be traced


def looping(self, x):
    for _ in range(x.shape[0]):
        x = x + 1
    y = self.block(x)
    return self.norm1(self.conv1(y if len(x.tolist()) else y + 1))


def untraceable(forward=looping):
    model = net(forward, block=pair())
    del model.conv2, model.norm2
    return settled(model)


def test_the_children_of_an_untraceable_model_are_looked_at():
    _, plan = assert_folded(untraceable(), X, left=1)
    assert plan.folded == {"block.1": "block.0"}
    assert plan.left["norm1"] == (
        "it may be called by the model, which cannot be traced (TypeError: "
        "'Proxy' object cannot be interpreted as an integer)"
    )


def test_with_an_example_an_untraceable_model_is_seen_whole():
    assert_folded(untraceable(), X, example=X)


def test_an_untraceable_part_is_one_step_of_the_rest():
    """Its own children, and what stands around it, are folded."""
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), untraceable(), *pair())
    _, plan = assert_folded(settled(model), X, left=1)
    assert list(plan.left) == ["2.norm1"]


def test_a_part_that_an_untraceable_model_uses_itself_is_left():
    def forward(self, x):
        y = self.block(x) + self.block[0](x)
        return y * len(x.tolist()) / len(y)

    _, plan = assert_folded(untraceable(forward), X, left=2)
    assert "may be called by the model" in plan.left["block.1"]
    example = plan_folding(untraceable(forward), X)
    assert "also goes to add()" in example.left["block.1"]


def test_a_slice_of_a_model_is_put_together_by_its_user():
    def forward(self, x):
        y = self.block[:1](x)
        y = y + self.block[1:](y)
        return y * nn.Sequential(Choosy(4, 4, 1)).double()(x).mean()

    assert "also goes to add()" in left(untraceable_block(forward), X)
    assert "may be called by the model" in left(untraceable_block(forward))


def untraceable_block(forward):
    return settled(Net(forward, block=pair()))


def test_a_weight_that_a_traced_part_uses_itself_is_named_in_full():
    def forward(self, x):
        return self.norm1(self.conv1(x)) * self.conv1.weight.sum()

    model = untraceable()
    model.block = net(forward)
    assert (
        "'block.conv1' has tensors" in plan_folding(model).left["block.norm1"]
    )


def test_a_part_that_fails_on_one_path_is_seen_on_it():
    class Sizes(nn.Module):
        def forward(self, x):
            raise LookupError("traced") if isinstance(x, fx.Proxy) else None

    def forward(self, x):
        y = self.conv1(x)
        if x.shape[0] > 1:
            y = y * self.sizes(y)
        return self.norm1(y)

    plan = plan_folding(net(forward, sizes=Sizes()))
    assert "from mul()" in plan.left["norm1"]


def test_a_layer_that_an_untraceable_model_holds_is_left():
    model = untraceable()
    model.first = model.block[0]
    _, plan = assert_folded(model, X, left=2)
    assert "'block.0' may be called by the model" in plan.left["block.1"]


def test_what_a_run_returns_is_looked_into():
    def forward(self, x):
        y = self.conv1(x)
        return Bag(y), self.norm1(y), range(len(x))

    assert "cannot be traced" in plan_folding(net(forward)).left["norm1"]
    plan = plan_folding(net(forward), X)
    assert "also goes to the output" in plan.left["norm1"]


@pytest.mark.parametrize("example", [None, X], ids=["traced", "run"])
def test_a_hook_of_what_surrounds_a_layer_sees_its_output(example):
    seen = []
    inner = nn.Sequential(conv())
    inner.register_forward_hook(lambda m, args, y: seen.append(y))
    model = settled(nn.Sequential(inner, nn.BatchNorm2d(4), *pair()))
    _, plan = assert_folded(model, X, left=1, example=example)
    assert "'0' (Sequential)" in plan.left["1"]
    seen.clear()
    plan_folding(model)
    assert not seen


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "change",
    [
        torch.fx.symbolic_trace,
        lambda m: torch.compile(m, backend="eager"),
        lambda m: nn.Sequential(torch.jit.script(m), *pair()),
    ],
    ids=["fx", "compiled", "scripted"],
)
def test_models_that_other_tools_have_changed(change):
    model = settled(change(settled(pair())))
    assert_folded(model, X)


@pytest.mark.parametrize("tensor", ["weight", "output"])
def test_what_a_model_assigns_data_to_is_left(tensor):
    """A stand-in for a tensor takes any attribute, and does not show it."""

    def forward(self, x):
        if tensor == "weight":
            self.conv1.weight.data = self.conv2.weight.data * 2
        y = self.conv1(x)
        if tensor == "output":
            y.data = x.data
        return self.norm1(y)

    assert "assignment to 'data'" in plan_folding(net(forward)).left["norm1"]
    assert_folded(net(forward), X, left=2, example=X)


def doubled(x):
    return x * 2


def through_script(self, x):
    y = self.conv1(x)
    return self.norm1(y) + torch.jit.script(doubled)(y)


def through_vmap(self, x):
    y = self.conv1(x)
    return self.norm1(y) + torch.vmap(torch.sin)(y)


def with_lent_weights(self, x):
    lent = {"weight": self.conv2.weight}
    return self.norm1(torch.func.functional_call(self.conv1, lent, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (through_script, "the output of 'conv1' also goes to mul()"),
        (through_vmap, "the output of 'conv1' also goes to sin()"),
        (with_lent_weights, "'conv1' has tensors that are used outside of it"),
    ],
)
def test_a_run_sees_what_no_function_in_python_does(forward, said):
    _, plan = assert_folded(net(forward), X, left=2, example=X)
    assert plan.left["norm1"] == said


def test_a_part_that_is_compiled_by_itself_is_looked_into():
    """Asked for its truth, it asks for the length of what it holds."""
    inside = Net(lambda self, x: self.norm(self.conv(x)), conv=conv())
    inside.norm = nn.BatchNorm2d(4)
    inside = torch.compile(inside, backend="eager")
    _, plan = assert_folded(settled(nn.Sequential(inside, *pair())), X)
    assert plan.folded["0._orig_mod.norm"] == "0._orig_mod.conv"


def test_endless_decisions_end():
    def forward(self, x):
        while x.sum() > 0:
            x = x - 1
        return self.norm1(self.conv1(x))

    plan = plan_folding(net(forward))
    assert "more than 32 decisions" in plan.left["norm1"]
    assert plan_folding(net(forward), X).folded == {"norm1": "conv1"}


def test_many_paths_are_not_followed():
    def forward(self, x):
        for i in range(6):
            x = x + 1 if x[0, 0, 0, i] > 0 else x
        return self.norm1(self.conv1(x))

    assert "more than 32 paths" in plan_folding(net(forward)).left["norm1"]


def test_a_failing_example_fails():
    with pytest.raises(RuntimeError, match="channels"):
        fold_batch_norm(settled(pair()), draw(1, 3, 5, 5))


@pytest.mark.parametrize("example", [(X, X + 1), {"skip": X, "x": X + 1}])
def test_an_example_has_all_the_arguments(example):
    model = settled(Skip())
    model.extend = pair()
    assert "add()" in plan_folding(model, example).left["norm"]


# The copy


def tensors(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("example", [None, X], ids=["traced", "run"])
def test_the_model_stays_as_it_is_and_shares_nothing(example):
    model = untraceable()
    model.register_buffer("calls", torch.zeros(()))
    before, state = dict(vars(model)), tensors(model)
    run = model.run

    def counting(self, x):
        self.calls += 1
        self.last = run(self, x)
        return self.last

    model.run = before["run"] = counting
    folded = fold_batch_norm(model, example)
    assert vars(model) == before
    assert all(torch.equal(a, state[n]) for n, a in tensors(model).items())
    mine = {
        t.untyped_storage().data_ptr() for t in model.state_dict().values()
    }
    theirs = folded.state_dict().values()
    assert mine.isdisjoint({t.untyped_storage().data_ptr() for t in theirs})
    assert not any(p.grad_fn for p in folded.parameters())


def test_folding_again_changes_nothing():
    model = settled(models.resnet([4, 6], norm=nn.BatchNorm2d))
    once = fold_batch_norm(model)
    again = fold_batch_norm(once)
    assert repr(again) == repr(once)
    for a, b in zip(once.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_model_without_batch_norm_is_copied():
    model = settled(models.mlp([4, 5, 3]))
    folded, plan = assert_folded(model, draw(2, 4))
    assert plan == ({}, {})
    assert folded is not model


def test_a_parameter_trains_as_before():
    """A bias that there was not trains as that of the batch norm did."""
    for frozen in ("0.weight", "0.bias", "1.bias", "none"):
        for bias in (True, False):
            model = settled(nn.Sequential(conv(bias), nn.BatchNorm2d(4)))
            for name, p in model.named_parameters():
                p.requires_grad_(name != frozen)
            folded = fold_batch_norm(model)[0]
            assert folded.weight.requires_grad == (frozen != "0.weight")
            source = "0.bias" if bias else "1.bias"
            assert folded.bias.requires_grad == (frozen != source)


def test_hooks_of_other_modules_go_on():
    heard = []
    model = settled(nn.Sequential(pair(), nn.ReLU()))
    model[0].register_forward_hook(lambda m, args, y: heard.append(y))
    folded = fold_batch_norm(model)
    heard.clear()
    assert_close(folded(X), heard[0].relu())


def test_the_memory_format_is_kept():
    model = settled(models.resnet([4, 6], norm=normlib.BatchNorm2d))
    model = model.to(memory_format=torch.channels_last)
    folded = fold_batch_norm(model)
    x = draw(2, 3, 6, 6).to(memory_format=torch.channels_last)
    assert folded[0].weight.stride() == model[0].weight.stride()
    assert folded[0](x).is_contiguous(memory_format=torch.channels_last)
    transposed = settled(
        nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6))
    ).to(memory_format=torch.channels_last)
    folded = fold_batch_norm(transposed)
    assert folded[0].weight.stride() == transposed[0].weight.stride()


@over_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixed", [False, True])
def test_other_dtypes_are_kept_and_close(dtype, mixed, device):
    """The weights are rounded once; batch norm may stay in float32."""
    model = settled(nn.Sequential(conv(), normlib.BatchNorm2d(4)), dtype)
    if mixed:
        model[1].float()
    model, x = model.to(device), X.to(device, dtype)
    folded = fold_batch_norm(model)
    assert {p.dtype for p in folded.parameters()} == {dtype}
    assert_close(folded(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_copy_is_a_model_like_others(tmp_path):
    model = settled(models.resnet([4, 6], norm=normlib.BatchNorm2d))
    folded = fold_batch_norm(model)
    x = draw(2, 3, 6, 6)
    exported = torch.export.export(folded, (x,)).module()
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    again = fold_batch_norm(
        settled(models.resnet([4, 6], norm=nn.BatchNorm2d))
    )
    again.load_state_dict(folded.state_dict())
    ways = {
        "deepcopy": copy.deepcopy(folded),
        "pickle": pickle.loads(pickle.dumps(folded)),
        "traced": torch.fx.symbolic_trace(folded),
        "script": torch.jit.script(folded),
        "state": again,
        "compiled": compiled,
        "exported": exported,
    }
    for way in ways.values():
        assert_close(way(x), model(x), tolerance=EXACT)
    folded.train()(x).sum().backward()
    assert all(p.grad is not None for p in folded.parameters())
