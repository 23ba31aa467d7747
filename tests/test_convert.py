"""Layers change their library and keep everything else; so do weights."""

import copy
import io
import json
import math
import pathlib
import pickle
import weakref

import numpy
import pytest
import torch
from devices import over_devices
from torch import nn
from twins import FULL, LAYERS, TWINS, assert_same, outcome, over

import normlib
from normlib import convert
from normlib.stats import ExponentialAverage, Moments
from normlib.testing import assert_close

RECORD = json.loads(
    (pathlib.Path(__file__).parent / "golden/conventions.json").read_text()
)
BATCH_NORMS = {
    key: twin
    for key, twin in LAYERS.items()
    if twin.name.startswith("BatchNorm")
}


def f64(values):
    """The recorded numbers in all their digits."""
    return torch.tensor(values, dtype=torch.float64)


def cases(library, *without):
    """Parametrize a test over a library's recorded layers."""
    recorded = RECORD[library]
    names = [n for n in recorded if not any(w in n for w in without)]
    values = [recorded[name] for name in names]
    return pytest.mark.parametrize("case", values, ids=names)


def small_net(library):
    """Convolution, every kind of norm, a layer that stands twice."""
    torch.manual_seed(0)
    twice = library.BatchNorm2d(4)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        twice,
        nn.ReLU(),
        nn.Sequential(library.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), twice),
        library.InstanceNorm2d(4, affine=True),
        nn.Flatten(2),
        library.BatchNorm1d(4),
        library.LayerNorm(16),
        library.RMSNorm(16),
        nn.Linear(16, 3),
    ).double()


def trajectory(net, optimizer, steps, seed=0):
    """Losses and final state of some steps of training."""
    g = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x = torch.randn(5, 2, 6, 6, generator=g, dtype=torch.float64)
        loss = (net(x) - x.mean()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


# From torch.nn and back.


@over(TWINS)
def test_a_layer_of_torch_becomes_its_namesake(twin):
    expected, layer = twin.pair(dtype=torch.float64)
    before = copy.deepcopy(layer)
    convert.from_torch(layer)
    assert type(layer) is type(expected)
    assert repr(layer) == repr(before)
    assert vars(layer).keys() == vars(expected).keys()
    x, dy = twin.draw(dtype=torch.float64), twin.draw(1, torch.float64)
    with normlib.use_backend("eager"):
        ours = outcome(layer, x, dy)
    assert_same(ours, outcome(before, x, dy))
    assert layer.state_dict().keys() == before.state_dict().keys()


@over(TWINS)
def test_there_and_back_is_nothing(twin):
    _, layer = twin.pair(dtype=torch.float64)
    before = copy.deepcopy(layer)
    assert convert.to_torch(convert.from_torch(layer)) is layer
    assert type(layer) is type(before)
    x, dy = twin.draw(dtype=torch.float64), twin.draw(1, torch.float64)
    pairs = zip(outcome(layer, x, dy), outcome(before, x, dy), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    state = layer.state_dict()
    before.load_state_dict(state, strict=True)
    assert state._metadata == before.state_dict()._metadata


@over(TWINS)
def test_a_layer_made_here_becomes_torchs(twin):
    """Its own attributes are enough for the methods of torch's class."""
    layer, expected = twin.pair(dtype=torch.float64)
    convert.to_torch(layer)
    assert type(layer) is type(expected)
    assert repr(layer) == repr(expected)
    x, dy = twin.draw(dtype=torch.float64), twin.draw(1, torch.float64)
    assert_same(outcome(layer, x, dy), outcome(expected, x, dy))
    layer.reset_parameters()
    expected.reset_parameters()
    assert_same(layer.state_dict().values(), expected.state_dict().values())


def test_parameters_and_buffers_are_the_same_objects():
    net = small_net(nn)
    before = net.state_dict(keep_vars=True)
    convert.from_torch(net)
    after = net.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)


def test_a_whole_model_and_every_kind():
    net = convert.from_torch(small_net(nn))
    kinds = [type(module) for module in net.modules()]
    expected = [type(module) for module in small_net(normlib).modules()]
    assert kinds == expected
    assert net[3][2] is net[1]
    kinds = [type(module) for module in convert.to_torch(net).modules()]
    assert kinds == [type(module) for module in small_net(nn).modules()]


def test_tied_parameters_stay_tied():
    net = nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3))
    net[1].weight = net[0].weight
    convert.from_torch(net)
    assert net[1].weight is net[0].weight


def test_modes_frozen_parameters_dtypes_and_devices_are_kept():
    net = nn.ModuleDict(
        {
            "evaluated": nn.BatchNorm1d(3).eval(),
            "frozen": nn.LayerNorm(3).requires_grad_(False),
            "narrow": nn.RMSNorm(3, dtype=torch.bfloat16),
            "nowhere": nn.GroupNorm(1, 3, device="meta"),
        }
    )
    convert.from_torch(net)
    assert not net["evaluated"].training
    assert net["frozen"].training
    assert not net["frozen"].weight.requires_grad
    assert net["narrow"].weight.dtype == torch.bfloat16
    assert net["nowhere"].weight.is_meta


@pytest.mark.parametrize("there", [convert.from_torch, convert.to_torch])
def test_training_goes_on_with_the_same_optimizer(there):
    library = nn if there is convert.from_torch else normlib
    straight, turned = small_net(library), small_net(library)
    runs = []
    for net in (straight, turned):
        adam = torch.optim.Adam(net.parameters(), 1e-2)
        with normlib.use_backend("eager"):
            losses = trajectory(net, adam, 5)
            if net is turned:
                there(net)
            losses += trajectory(net, adam, 5, seed=1)
        runs.append(losses)
    assert_close(runs[1], runs[0])
    assert_close(
        list(turned.state_dict().values()),
        list(straight.state_dict().values()),
    )


def test_hooks_go_on_and_their_handles_remove_them():
    net, seen = small_net(nn), []
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    handle = net[1].register_forward_hook(lambda *args: seen.append(args[0]))
    convert.from_torch(net)
    net(x)
    assert seen == [net[1], net[1]]
    handle.remove()
    net(x)
    assert len(seen) == 2


def test_hooks_that_hold_their_module_still_hold_it():
    """As load_state_dict's do, weakly: another object would be a dead one."""
    layer, seen = nn.LayerNorm(3), []
    layer.register_load_state_dict_pre_hook(lambda m, *args: seen.append(m))
    held = weakref.ref(layer)
    net = convert.from_torch(nn.Sequential(layer))
    net.load_state_dict(net.state_dict())
    assert seen == [net[0]]
    assert held() is net[0]


class Listed(nn.Module):
    """Keeps its layers in a plain list as well, as some models do."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.steps = [self.norm]


def test_references_that_torch_does_not_know_of_see_the_same_layer():
    net = convert.from_torch(Listed())
    assert net.steps[0] is net.norm
    assert type(net.norm) is normlib.BatchNorm1d


class Own(nn.LayerNorm):
    """Somebody's subclass, which may do anything in its forward."""


def test_what_is_not_a_layer_of_torch_itself_stays():
    parametrized = nn.utils.parametrizations.weight_norm(nn.LayerNorm(3, 3))
    net = nn.ModuleList(
        [
            Own(3),
            nn.SyncBatchNorm(3),
            nn.LazyBatchNorm2d(),
            parametrized,
            nn.LocalResponseNorm(3),
            torch.compile(nn.Linear(3, 3), backend="eager"),
        ]
    )
    before = [type(module) for module in net.modules()]
    convert.to_torch(convert.from_torch(net))
    assert [type(module) for module in net.modules()] == before


def test_subclasses_of_ours_stay_too():
    ghost = normlib.variants.GhostBatchNorm(3)
    net = convert.to_torch(nn.Sequential(ghost))
    assert net[0] is ghost
    assert type(ghost) is normlib.variants.GhostBatchNorm


def test_torch_has_no_batch_norm_of_any_rank():
    net = nn.Sequential(normlib.LayerNorm(3), normlib.BatchNorm(3))
    with pytest.raises(ValueError, match=r"'1'.*any rank"):
        convert.to_torch(net)
    assert type(net[0]) is normlib.LayerNorm


def test_a_converted_model_is_copied_pickled_and_saved():
    net = convert.from_torch(small_net(nn))
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    net(x)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    copies = [
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(file, weights_only=False),
    ]
    expected = net.eval()(x)
    for twin in copies:
        assert torch.equal(twin.eval()(x), expected)
        assert twin[3][2] is twin[1]


def test_checkpoints_fit_both_ways():
    theirs, ours = small_net(nn), convert.from_torch(small_net(nn))
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    ours(x)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_close(ours.eval()(x), theirs.eval()(x))


def test_a_compiled_model_sees_the_change():
    net = small_net(nn).float()
    compiled = torch.compile(net, backend="eager")
    x = torch.randn(3, 2, 6, 6)
    expected = copy.deepcopy(net)
    assert_close(compiled(x), expected(x))
    convert.from_torch(compiled)
    assert type(net[1]) is normlib.BatchNorm2d
    assert_close(compiled(x), expected(x))
    assert_close(net[1].running_var, expected[1].running_var)


def test_a_converted_model_compiles_in_one_graph():
    net = convert.from_torch(small_net(nn).float())
    expected = copy.deepcopy(net)
    x = torch.randn(3, 2, 6, 6)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert_close(compiled(x), expected(x))


def test_torchs_transformer_reads_our_layers_as_its_own():
    """In evaluation it takes a fast path, with the layers' own attributes."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    expected = copy.deepcopy(layer)
    convert.from_torch(layer)
    assert type(layer.norm1) is normlib.LayerNorm
    x = torch.randn(2, 5, 8)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            assert_close(layer(x), expected(x))


# Any module in the place of another.


def relu_to_tanh(name, module):
    return nn.Tanh() if isinstance(module, nn.ReLU) else None


def test_each_module_is_asked_about_once_parents_first():
    net, asked = small_net(nn), []
    convert.replace_modules(net, lambda name, module: asked.append(name))
    assert asked == [name for name, _ in net.named_modules()]
    assert "3.2" not in asked  # which is 1 again


def test_a_shared_module_is_replaced_wherever_it_stands():
    act = nn.ReLU()
    inner = nn.Sequential(act, nn.Linear(2, 2))
    net = nn.Sequential(act, inner, inner, act)
    assert convert.replace_modules(net, relu_to_tanh) is net
    assert isinstance(net[0], nn.Tanh)
    assert net[0] is net[1][0] is net[3]
    assert net[1] is net[2] is inner
    assert list(net._modules) == ["0", "1", "2", "3"]


def test_the_model_itself_may_be_replaced():
    assert isinstance(
        convert.replace_modules(nn.ReLU(), relu_to_tanh), nn.Tanh
    )


class Cycle(nn.Module):
    """A child that knows its parent, as a registered module."""

    def __init__(self):
        super().__init__()
        self.child = nn.Module()
        self.child.act = nn.ReLU()
        self.child.parent = self
        self.nothing = None
        self.register_module("empty", None)


def test_cycles_and_empty_places():
    net = convert.replace_modules(Cycle(), relu_to_tanh)
    assert isinstance(net.child.act, nn.Tanh)
    assert net.child.parent is net
    assert net.empty is None


def test_a_replacement_may_hold_what_it_replaces():
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    old = list(net.modules())

    def rule(name, module):
        wraps = isinstance(module, nn.Linear)
        return nn.Sequential(module, nn.Dropout()) if wraps else None

    convert.replace_modules(net, rule)
    assert net[1][0] is old[3]
    assert net[0][0][0] is old[2]


def test_the_inside_of_what_is_replaced_is_left_alone():
    act = nn.ReLU()
    inner = nn.Sequential(act)
    net = nn.Sequential(inner, act)

    def rule(name, module):
        if module is inner:
            return nn.Identity()
        return relu_to_tanh(name, module)

    convert.replace_modules(net, rule)
    assert isinstance(net[0], nn.Identity)
    assert isinstance(net[1], nn.Tanh)
    assert inner[0] is act


def test_a_rule_that_raises_halfway_changes_nothing():
    net = small_net(nn)
    before = dict(net.named_modules())

    def rule(name, module):
        if isinstance(module, nn.RMSNorm):
            raise KeyError(name)
        return nn.Identity() if isinstance(module, nn.BatchNorm2d) else None

    with pytest.raises(KeyError, match="8"):
        convert.replace_modules(net, rule)
    after = dict(net.named_modules())
    assert after == before


def test_a_rule_returns_a_module_or_none():
    net = nn.Sequential(nn.ReLU(), nn.ReLU())
    with pytest.raises(TypeError, match=r"'0' \(ReLU\), received bool"):
        convert.replace_modules(net, lambda name, module: name == "0" or None)


def test_a_replacement_takes_the_mode_of_its_place():
    net = nn.Sequential(nn.ReLU().eval(), nn.ReLU())
    frozen = nn.BatchNorm1d(3).eval()

    def rule(name, module):
        if isinstance(module, nn.ReLU):
            return nn.Sequential(
                nn.Dropout(), frozen if name == "1" else module
            )
        return None

    net.append(frozen)
    convert.replace_modules(net, rule)
    assert not net[0].training
    assert not net[0][0].training
    assert net[1][0].training
    assert not frozen.training  # it stood in the model before


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_the_inside_of_a_scripted_module_is_not_visited():
    scripted = torch.jit.trace(nn.Sequential(nn.ReLU()), torch.ones(2))
    net = nn.Sequential(scripted, nn.ReLU())
    asked = []
    convert.replace_modules(
        net, lambda name, module: asked.append(name) or None
    )
    assert asked == ["", "0", "1"]


# From batch norm to group norm.


@pytest.mark.parametrize("library", [nn, normlib], ids=["torch", "normlib"])
@over(BATCH_NORMS)
def test_group_norm_keeps_what_was_learned(library, twin):
    pair = twin.pair(dtype=torch.float64)
    layer = pair[library is nn].eval()
    weight, bias = layer.weight, layer.bias
    new = convert.batch_norm_to_group_norm(layer, 1)
    assert type(new) is library.GroupNorm
    assert new.weight is weight
    assert new.bias is bias
    assert not new.training
    x = twin.draw(dtype=torch.float64)
    expected = nn.functional.group_norm(x, 1, weight, bias, layer.eps)
    assert_close(new(x), expected)
    fresh = library.GroupNorm(1, 3, layer.eps)
    assert repr(new) == repr(fresh)
    assert new.state_dict().keys() == fresh.state_dict().keys()


def test_with_a_group_for_each_channel_it_is_instance_norm():
    net = nn.Sequential(nn.Conv2d(2, 4, 1), normlib.BatchNorm2d(4, eps=0.1))
    convert.batch_norm_to_group_norm(net, lambda channels: channels)
    x = torch.randn(3, 4, 5, 5)
    assert_close(net[1](x), nn.functional.instance_norm(x, eps=0.1))


@pytest.mark.parametrize(
    ("config", "affine"),
    [({"affine": False}, False), ({"bias": False}, True)],
    ids=["no affine", "no bias"],
)
def test_what_a_batch_norm_lacks_its_group_norm_lacks(config, affine):
    layer = normlib.BatchNorm(4, **config)
    new = convert.batch_norm_to_group_norm(layer, 2)
    assert new.affine == affine
    assert new.bias is None
    assert (new.weight is not None) == affine
    assert repr(new) == repr(normlib.GroupNorm(2, 4, **config))


def test_every_batch_norm_of_a_model_and_nothing_else():
    net = small_net(nn)
    net.append(nn.SyncBatchNorm(6))
    convert.batch_norm_to_group_norm(net, lambda c: math.gcd(c, 2))
    assert type(net[1]) is nn.GroupNorm
    assert net[3][2] is net[1]
    assert type(net[6]) is nn.GroupNorm
    assert type(net[-1]) is nn.GroupNorm
    assert (net[-1].num_groups, net[-1].num_channels) == (2, 6)
    assert type(net[4]) is nn.InstanceNorm2d
    assert not any("running" in key for key in net.state_dict())


def test_a_compiled_model_sees_its_group_norm():
    net = small_net(nn).float()
    compiled = torch.compile(net, backend="eager")
    x = torch.randn(3, 2, 6, 6)
    compiled(x)
    convert.batch_norm_to_group_norm(compiled, 2)
    assert type(net[1]) is nn.GroupNorm
    assert_close(compiled(x), net(x))


def test_what_is_compiled_by_itself_is_not_replaced_behind_its_code():
    """A compiled layer keeps the code of the layer it was made of."""
    layer = nn.BatchNorm2d(4)
    net = nn.Sequential(
        nn.BatchNorm2d(4), torch.compile(layer, backend="eager")
    )
    with pytest.raises(ValueError, match="replace it before"):
        convert.batch_norm_to_group_norm(net, 2)
    assert type(net[0]) is nn.BatchNorm2d
    convert.from_torch(net)  # which leaves the objects what they are
    assert type(layer) is normlib.BatchNorm2d
    x = torch.randn(2, 4, 3, 3)
    assert_close(
        net[1](x), nn.functional.batch_norm(x, None, None, training=True)
    )


def test_an_optimizer_goes_on_with_the_group_norm():
    net = small_net(nn)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    convert.batch_norm_to_group_norm(net, 2)
    before = net[1].weight.detach().clone()
    trajectory(net, sgd, 1)
    assert not torch.equal(net[1].weight, before)


@pytest.mark.parametrize("groups", [32, 5, 0, -1])
def test_groups_that_do_not_divide_the_channels_are_refused(groups):
    net = nn.Sequential(nn.BatchNorm2d(160), nn.Sequential(nn.BatchNorm2d(24)))
    before = list(net.modules())
    with pytest.raises(ValueError, match=f"num_groups={groups}"):
        convert.batch_norm_to_group_norm(net, groups)
    assert list(net.modules()) == before


def test_the_layer_that_cannot_be_converted_is_named():
    net = nn.Sequential(nn.BatchNorm2d(64), nn.Sequential(nn.BatchNorm2d(24)))
    with pytest.raises(
        ValueError,
        match=r"'1.0' \(BatchNorm2d\): num_channels=24 .* num_groups=32",
    ):
        convert.batch_norm_to_group_norm(net)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d, nn.SyncBatchNorm, normlib.BatchNorm]
)
def test_groups_of_one_value_are_refused(layer):
    """Each value would be its own mean, and only the bias would be left."""
    x = torch.randn(5, 32)
    assert not nn.functional.group_norm(x, 32).any()
    with pytest.raises(ValueError, match="num_groups=32 are groups of one"):
        convert.batch_norm_to_group_norm(nn.Sequential(layer(32)))


def test_hooks_are_not_lost_silently():
    net = nn.Sequential(nn.BatchNorm2d(4))
    handle = net[0].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"'0'.*hooks"):
        convert.batch_norm_to_group_norm(net, 2)
    handle.remove()
    convert.batch_norm_to_group_norm(net, 2)


# The conventions.


def test_the_defaults_are_the_recorded_ones():
    assert convert.CONVENTIONS.keys() == {"torch", *RECORD["defaults"]}
    for library in ("keras", "flax"):
        row = convert.CONVENTIONS[library]
        assert RECORD["defaults"][library]["BatchNorm"] == {
            "axis": row.channel_axis,
            "momentum": row.decay,
            "epsilon": row.eps,
        }
    row = convert.CONVENTIONS["tensorflow"]
    assert RECORD["defaults"]["tensorflow"]["fused"] == {
        "epsilon": row.eps,
        "exponential_avg_factor": convert.momentum_from_decay(row.decay),
    }
    row, layer = convert.CONVENTIONS["torch"], nn.BatchNorm1d(1)
    assert row.eps == layer.eps
    assert row.decay == convert.decay_from_momentum(layer.momentum)


def test_momentum_turns_round_in_decimal_digits():
    assert 1 - 0.99 != 0.01
    assert convert.momentum_from_decay(0.99) == 0.01
    assert convert.decay_from_momentum(0.1) == 0.9
    assert convert.momentum_from_decay(numpy.float32(0.9)) == pytest.approx(
        0.1, rel=1e-6
    )
    for decay in (0, 1, 0.5, 0.999, 0.9997, 1e-9):
        momentum = convert.momentum_from_decay(decay)
        assert convert.decay_from_momentum(momentum) == decay


@pytest.mark.parametrize("weight", [-0.01, 1.01, 99, math.nan])
def test_a_weight_lies_between_zero_and_one(weight):
    with pytest.raises(ValueError, match=f"decay.*{weight}"):
        convert.momentum_from_decay(weight)
    with pytest.raises(ValueError, match=f"momentum.*{weight}"):
        convert.decay_from_momentum(weight)


def test_a_cumulative_average_has_no_decay():
    with pytest.raises(ValueError, match="momentum=None"):
        convert.decay_from_momentum(None)


def test_the_fused_kernel_of_tensorflow_keeps_the_unbiased_variance():
    fused = {key: torch.tensor(v) for key, v in RECORD["fused"].items()}
    scale, offset, mean, variance = fused["start"]
    x = fused["x"].movedim(-1, 1)
    layer = normlib.BatchNorm2d(4, eps=1e-3, momentum=0.1)
    layer.load_state_dict(
        {
            "weight": scale,
            "bias": offset,
            "running_mean": mean,
            "running_var": variance,
        },
        strict=False,
    )
    assert_close(layer(x), fused["y"].movedim(-1, 1))
    assert_close(layer.running_mean, fused["mean"])
    assert_close(layer.running_var, fused["variance"])


@pytest.mark.parametrize("library", ["keras", "flax"])
@pytest.mark.parametrize("name", RECORD["others"])
def test_the_other_norms_differ_in_their_eps_only(name, library):
    case = RECORD["others"][name]
    x, weight = f64(case["x"]), case["scale"]
    eps = case[library]["epsilon"]
    assert eps == RECORD["defaults"][library][name]["epsilon"]
    grouped = name == "GroupNorm"
    sizes = (case["groups"], 6) if grouped else (6,)
    layer = getattr(normlib, name)(*sizes, eps=eps, dtype=torch.float64)
    state = {"weight": weight, "bias": case["bias"]}
    layer.load_state_dict(
        {k: f64(v) for k, v in state.items() if v is not None}
    )
    y = layer(x.movedim(-1, 1)).movedim(1, -1) if grouped else layer(x)
    assert_close(y, case[library]["y"])


# Weights from Keras and flax, and back.


def from_keras(case, when, count=None):
    return convert.from_keras_batch_norm(
        case["config"], case[when], count=count
    )


def from_flax(case, when, count=None):
    return convert.from_flax_batch_norm(
        case["fields"], case[when], count=count
    )


def inputs(case):
    """The recorded batches with their channels on axis 1, and their axis."""
    config = case.get("config") or case["fields"]
    batches = [f64(x) for x in case["batches"]]
    return [x.movedim(config["axis"], 1) for x in batches], config["axis"]


def variances(case, when):
    """The recorded variance, of Keras or of flax."""
    found = case[when]
    if isinstance(found, list):
        return f64(found[-1])
    return f64(found["batch_stats"]["var"])


LOADERS = {"keras": from_keras, "flax": from_flax}
EVERY_LAYER = [
    pytest.param(library, case, id=f"{library}: {name}")
    for library in LOADERS
    for name, case in RECORD[library].items()
]
TRAINABLE = [p for p in EVERY_LAYER if "frozen" not in p.id]
every_layer = pytest.mark.parametrize(("library", "case"), EVERY_LAYER)
every_trainable = pytest.mark.parametrize(("library", "case"), TRAINABLE)


def test_the_record_says_where_it_comes_from():
    assert {"keras", "tensorflow", "flax", "jax", "date", "script"} <= set(
        RECORD["origin"]
    )


@every_layer
def test_a_trained_layer_evaluates_as_it_did(library, case):
    layer = LOADERS[library](case, "after").eval()
    (x, _), axis = inputs(case)
    assert_close(layer(x).movedim(1, axis), case["evaluation"])


@every_trainable
def test_a_layer_trains_on_as_it_would_have(library, case):
    """Its variance apart, which is unbiased from now on."""
    layer = LOADERS[library](case, "before")
    batches, axis = inputs(case)
    for x, y in zip(batches, case["training"], strict=True):
        assert_close(layer(x).movedim(1, axis), y)
    assert_close(
        layer.running_mean, LOADERS[library](case, "after").running_mean
    )
    m = batches[0].numel() // batches[0].shape[1]
    start = variances(case, "before")
    kept = convert.decay_from_momentum(layer.momentum) ** 2 * start
    new = (variances(case, "after") - kept) * m / (m - 1)
    assert_close(layer.running_var, kept + new)


@every_trainable
def test_the_average_with_decay_is_the_one_they_keep(library, case):
    """From another start, whose share is known."""
    batches, _ = inputs(case)
    fields = case.get("config") or case["fields"]
    average = ExponentialAverage.with_decay(fields["momentum"])
    for x in batches:
        average.update(Moments.of(x.movedim(1, 0).flatten(1), [1]))
    start = average.missing * (variances(case, "before") - 1)
    assert_close(average.var.flatten() + start, variances(case, "after"))


@every_layer
def test_with_a_count_the_variance_becomes_the_unbiased_one(library, case):
    as_it_is = LOADERS[library](case, "after")
    layer = LOADERS[library](case, "after", count=5)
    assert_close(as_it_is.running_var, variances(case, "after"))
    assert_close(layer.running_var, as_it_is.running_var * 5 / 4)
    back = convert.to_keras_batch_norm(layer, count=5)[1][-1]
    assert_close(back, variances(case, "after"))


@cases("keras", "no scale")
def test_keras_weights_go_there_and_back(case):
    axis = case["config"]["axis"]
    layer = from_keras(case, "after")
    config, weights = convert.to_keras_batch_norm(layer, axis=axis)
    assert config == {key: case["config"][key] for key in config}
    assert set(config) == {"axis", "momentum", "epsilon", "center", "scale"}
    assert [w.tolist() for w in weights] == case["after"]


@cases("flax", "no scale")
def test_flax_variables_go_there_and_back(case):
    axis = case["fields"]["axis"]
    layer = from_flax(case, "after")
    fields, variables = convert.to_flax_batch_norm(layer, axis=axis)
    assert fields == case["fields"]
    listed = {
        kind: {name: value.tolist() for name, value in values.items()}
        for kind, values in variables.items()
    }
    assert listed == {"params": {}} | case["after"]


@pytest.mark.parametrize("library", LOADERS)
def test_a_shift_without_a_scale_has_a_scale_that_stays_one(library):
    case = RECORD[library]["image, no scale"]
    layer = LOADERS[library](case, "after")
    assert torch.equal(layer.weight, torch.ones_like(layer.weight))
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    config, weights = convert.to_keras_batch_norm(layer)
    assert config["scale"]
    assert weights[0].tolist() == [1, 1, 1, 1]


def test_frozen_in_keras_means_evaluation():
    """The record says so: training=True has not changed its statistics."""
    case = RECORD["keras"]["image, frozen"]
    assert case["before"] == case["after"]
    layer = from_keras(case, "before")
    assert not layer.training
    assert not any(p.requires_grad for p in layer.parameters())
    batches, axis = inputs(case)
    for x, y in zip(batches, case["training"], strict=True):
        assert_close(layer(x).movedim(1, axis), y)


def test_what_is_not_said_is_the_librarys_default():
    arrays = [[1.0], [0.0], [0.0], [1.0]]
    keras = convert.from_keras_batch_norm({}, arrays)
    assert (keras.eps, keras.momentum) == (1e-3, 0.01)
    stats = {"batch_stats": {"mean": [0.0], "var": [1.0]}}
    flax = convert.from_flax_batch_norm({}, stats)
    assert (flax.eps, flax.momentum) == (1e-5, 0.01)
    assert not flax.affine


def test_the_layer_has_the_arrays_dtype_and_its_own_memory():
    arrays = [numpy.ones(3, numpy.float32) for _ in range(4)]
    for array in arrays:
        array.flags.writeable = False
    layer = convert.from_keras_batch_norm({}, arrays)
    assert layer.weight.dtype == layer.running_var.dtype == torch.float32
    layer.running_mean.zero_()
    assert arrays[2].all()
    _, weights = convert.to_keras_batch_norm(layer)
    weights[0][:] = 7
    assert layer.weight.tolist() == [1, 1, 1]
    assert weights[0].dtype == numpy.float32


def test_whole_numbers_are_numbers():
    layer = convert.from_keras_batch_norm({}, [[1, 2], [0, 0], [3, 4], [1, 1]])
    assert layer.weight.dtype == torch.float32
    assert layer.running_mean.tolist() == [3, 4]


def test_bfloat16_leaves_in_float32():
    layer = normlib.BatchNorm(3, dtype=torch.bfloat16)
    _, weights = convert.to_keras_batch_norm(layer)
    assert {w.dtype for w in weights} == {numpy.dtype("float32")}


@over_devices
@pytest.mark.parametrize("library", [nn, normlib], ids=["torch", "normlib"])
def test_layers_of_torch_go_to_keras_and_flax_too(library, device):
    layer = library.BatchNorm2d(3, momentum=0.2, affine=False, device=device)
    config, weights = convert.to_keras_batch_norm(layer)
    assert config["momentum"] == 0.8
    assert len(weights) == 2
    fields, variables = convert.to_flax_batch_norm(layer)
    assert not fields["use_scale"]
    assert variables["params"] == {}


@pytest.mark.parametrize(
    ("config", "count", "said"),
    [
        ({}, 3, "expected 4 weights .gamma, beta, .*received 3"),
        ({"scale": False}, 4, "expected 3 weights .beta, .*received 4"),
        ({"renorm": True}, 4, "renorm=True"),
    ],
)
def test_weights_that_do_not_fit_keras_are_refused(config, count, said):
    with pytest.raises(ValueError, match=said):
        convert.from_keras_batch_norm(config, [[1.0, 2.0]] * count)


@pytest.mark.parametrize(
    "arrays",
    [
        [[1.0], [1.0, 2.0], [1.0], [1.0]],
        [[[1.0, 2.0]]] * 4,  # axis=[1, 2] has weights of two axes
        [1.0] * 4,
    ],
)
def test_weights_of_other_shapes_are_refused(arrays):
    with pytest.raises(ValueError, match="one shape"):
        convert.from_keras_batch_norm({}, arrays)


@pytest.mark.parametrize(
    ("variables", "received"),
    [
        ({}, "nothing"),
        ({"params": {"scale": [1.0]}}, "scale"),
        ({"batch_stats": {"mean": [0.0]}}, "mean"),
        ({"batch_stats": {"mean": [0.0], "var": [1.0], "count": 1}}, "count"),
        ({"batch_stats": {"bn": {"mean": [0.0], "var": [1.0]}}}, "bn"),
    ],
)
def test_variables_that_are_not_a_batch_norms_are_refused(variables, received):
    with pytest.raises(ValueError, match=f"received .*{received}"):
        convert.from_flax_batch_norm({}, variables)


@pytest.mark.parametrize(
    "to", [convert.to_keras_batch_norm, convert.to_flax_batch_norm]
)
def test_layers_that_keras_and_flax_do_not_have_are_refused(to):
    with pytest.raises(ValueError, match="momentum=None"):
        to(normlib.BatchNorm(3, momentum=None))
    with pytest.raises(ValueError, match="no running statistics"):
        to(normlib.BatchNorm(3, track_running_stats=False))
    with pytest.raises(TypeError, match="InstanceNorm1d"):
        to(nn.InstanceNorm1d(3, **FULL))
    with pytest.raises(ValueError, match="count=1"):
        to(normlib.BatchNorm(3), count=1)


def test_the_page_of_conventions_shows_the_same_numbers():
    page = (
        pathlib.Path(__file__).parents[1] / "appendix/conventions.md"
    ).read_text("utf-8")
    defaults = RECORD["defaults"]
    for name, row in {
        "BatchNorm": "Batch norm",
        "LayerNorm": "Layer norm",
        "GroupNorm": "Group norm",
        "RMSNorm": "RMS norm",
    }.items():
        line = next(x for x in page.splitlines() if x.startswith(f"| {row} |"))
        shown = [cell.strip() for cell in line.split("|")[3:5]]
        expected = [
            f"$10^{{{round(math.log10(defaults[lib][name]['epsilon']))}}}$"
            for lib in ("keras", "flax")
        ]
        assert shown == expected
