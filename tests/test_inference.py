import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

import normlib
from normlib import inference, variants
from normlib.inference import (
    FrozenBatchNorm,
    adapt_batch_norm,
    freeze_batch_norm,
    recalibrate_batch_norm,
)
from normlib.testing import assert_close


def values(*shape, seed=0, mean=0.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) + mean


class Block(nn.Module):
    """Convolutions, one layer of batch norm used twice, and dropout."""

    def __init__(self, library, channels=4):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.shared = library.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = self.shared(self.conv(x)).relu()
        return self.drop(self.shared(self.conv(y)) + x)


def network(library=normlib):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        library.BatchNorm2d(4),
        Block(library),
        nn.ModuleDict({"deep": nn.Sequential(Block(library))})["deep"],
        nn.Flatten(),
        nn.Linear(4 * 6 * 6, 5),
        library.BatchNorm1d(5),
    )
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, normlib.modules.BATCH_NORMS):
                m.weight.uniform_(0.5, 1.5)
                m.bias.uniform_(-1, 1)
    return model


def image_batches(*sizes):
    return [values(n, 3, 8, 8, seed=i, mean=2) for i, n in enumerate(sizes)]


def state_of(model):
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks))
        for m in model.modules()
    ]
    identity = [id(t) for t in (*model.parameters(), *model.buffers())]
    momenta = [getattr(m, "momentum", None) for m in model.modules()]
    return state, modes, hooks, identity, momenta


def assert_unchanged(model, before):
    after = state_of(model)
    assert list(after[0]) == list(before[0])
    for key in before[0]:
        assert torch.equal(after[0][key], before[0][key]), key
    assert after[1:] == before[1:]


LIBRARIES = pytest.mark.parametrize("library", [normlib, torch.nn])


@LIBRARIES
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("cuts", [[64], [1, 40, 41], [10, 20, 30, 50]])
def test_statistics_are_those_of_all_values(library, mean, cuts):
    x = values(64, 3, 5, mean=mean)
    layer = library.BatchNorm1d(3)
    batches = [p for p in x.tensor_split(cuts) if len(p)]
    recalibrate_batch_norm(layer, batches)
    exact = x.double()
    # To the last digit: around 1e6 the numbers of float32 are 0.06 apart.
    far = layer.running_mean - exact.mean((0, 2)).float()
    assert far.abs().max() < 1e-6
    assert_close(layer.running_var, exact.var((0, 2)).float())


@LIBRARIES
@given(cuts=st.lists(st.integers(1, 31), max_size=4, unique=True))
def test_the_first_layer_does_not_see_how_the_data_are_cut(library, cuts):
    x = values(32, 3, mean=5)
    layer = library.BatchNorm1d(3)
    parts = [p for p in x.tensor_split(sorted(cuts)) if len(p)]
    if len(parts[0]) == 1:
        parts.reverse()
    if len(parts[0]) == 1:
        return
    recalibrate_batch_norm(layer, parts)
    assert_close(layer.running_mean, x.mean(0))
    assert_close(layer.running_var, x.var(0))


@LIBRARIES
def test_deeper_layers_get_what_training_would_give_them(library):
    model = network(library)
    batches = image_batches(8, 8)
    recalibrate_batch_norm(model, batches)

    # By hand: every layer's inputs while all normalize by the batch.
    seen = {}

    def collect(name):
        def hook(module, args):
            seen.setdefault(name, []).append(args[0].double())

        return hook

    witness = copy.deepcopy(model).train()
    for name, m in witness.named_modules():
        if isinstance(m, nn.Dropout):
            m.eval()
        if isinstance(m, normlib.modules.BATCH_NORMS):
            m.register_forward_pre_hook(collect(name))
    for x in batches:
        witness(x)
    for name, inputs in seen.items():
        x = torch.cat([p.transpose(0, 1).flatten(1) for p in inputs], 1)
        layer = model.get_submodule(name)
        assert_close(layer.running_mean, x.mean(1).float(), tolerance=1e-5)
        assert_close(layer.running_var, x.var(1).float(), tolerance=1e-5)
    # One layer, called twice a batch:
    assert len(seen["2.shared"]) == 4


@LIBRARIES
def test_only_the_running_statistics_change(library):
    model = network(library)
    model.train()
    model[2].eval()  # a mixture of modes
    before = state_of(model)
    assert recalibrate_batch_norm(model, image_batches(8)) is model
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            assert not torch.equal(buffer, before[0][name])
            buffer.copy_(before[0][name])
    assert_unchanged(model, before)


def test_ours_and_torchs_get_the_same():
    ours, theirs = network(normlib), network(torch.nn)
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        recalibrate_batch_norm(model, image_batches(8, 5, 3))
    for key, value in theirs.state_dict().items():
        assert_close(ours.state_dict()[key], value, tolerance=1e-5)


class Stops(Exception):
    pass


def stopping():
    yield from image_batches(8, 8)
    raise Stops


def bad_shape():
    yield from image_batches(8)
    yield values(4, 3, 9)


NOT_FINITE = [*image_batches(4), torch.full((4, 3, 8, 8), torch.inf)]


@LIBRARIES
@pytest.mark.parametrize(
    ("batches", "error", "match"),
    [
        (stopping, Stops, None),
        (bad_shape, (RuntimeError, ValueError), None),
        (list, ValueError, "no batch to recalibrate from"),
        (lambda: NOT_FINITE, ValueError, "not finite"),
        (lambda: values(4, 3, 8, 8), TypeError, r"one tensor of shape \(4, "),
        (lambda: image_batches(1, 8), ValueError, "layer '6' received one"),
        (lambda: [values(0, 3, 8, 8)], Exception, None),
    ],
)
def test_after_an_error_the_model_is_as_it_was(library, batches, error, match):
    model = network(library)
    before = state_of(model)
    with pytest.raises(error, match=match):
        recalibrate_batch_norm(model, batches())
    assert_unchanged(model, before)


def test_what_takes_no_new_value_leaves_the_others_as_they_were():
    """The statistics of all layers move, or of none."""
    for make in (lambda v: v[:1].expand(5), inference_copy):
        model = network(torch.nn)
        model[6].running_var = make(model[6].running_var)
        before = state_of(model)
        with pytest.raises(RuntimeError, match=r"inference|single memory"):
            recalibrate_batch_norm(model, image_batches(8))
        assert_unchanged(model, before)


def inference_copy(value):
    with torch.inference_mode():
        return value.clone()


@pytest.mark.parametrize("scale", [1e3, 6e4])
def test_statistics_beyond_the_range_of_a_dtype_are_refused(scale):
    """1e6 is more than float16 holds, also where the values are less."""
    layer = normlib.BatchNorm1d(3, dtype=torch.float16)
    x = (values(64, 3) * scale).clamp(-6e4, 6e4).half()
    with pytest.raises(ValueError, match=r"torch.float16 cannot hold"):
        recalibrate_batch_norm(layer, [x])
    assert_close(layer.running_var, torch.ones(3))


@pytest.mark.parametrize("call", [freeze_batch_norm, lambda m: recalibrate(m)])
def test_a_lazy_layer_is_refused_until_it_has_values(call):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"layer '1', .* has no values yet"):
        call(model)
    assert type(model[0]) is nn.BatchNorm1d
    assert type(model[1]) is nn.LazyBatchNorm1d
    assert all(p.requires_grad for p in model.parameters())
    model(values(4, 3))
    call(model)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 3), nn.ReLU()),
        normlib.LayerNorm(3),
        normlib.BatchNorm1d(3, track_running_stats=False),
        torch.nn.InstanceNorm1d(3, track_running_stats=True),
    ],
)
def test_a_model_without_running_statistics_is_refused(model):
    for function in (freeze_batch_norm, lambda m: recalibrate(m)):
        with pytest.raises(ValueError, match="no layer of batch norm"):
            function(model)


def recalibrate(model):
    return recalibrate_batch_norm(model, [values(4, 3)])


@LIBRARIES
def test_a_last_batch_of_one_is_normalized_by_what_came_before(library):
    x = values(9, 3, mean=3)
    model = nn.Sequential(library.BatchNorm1d(3), library.BatchNorm1d(3))
    recalibrate_batch_norm(model, [x[:8], x[8:]])
    first, second = model
    assert_close(first.running_mean, x.mean(0))
    assert_close(first.running_var, x.var(0))
    z = nn.functional.batch_norm(x[:8], None, None, training=True)
    last = (x[8:] - x[:8].mean(0)) / (x[:8].var(0) + 1e-5).sqrt()
    z = torch.cat([z, last])
    assert_close(second.running_mean, z.mean(0), tolerance=1e-5)
    assert_close(second.running_var, z.var(0), tolerance=1e-5)


@LIBRARIES
def test_after_a_batch_of_one_the_next_is_normalized_by_itself(library):
    x = values(24, 3, mean=3)
    parts = [x[:8], x[8:9], x[9:] * 5]
    model = nn.Sequential(library.BatchNorm1d(3), nn.ReLU())
    model.append(library.BatchNorm1d(3))
    recalibrate_batch_norm(model, parts)
    z = [
        nn.functional.batch_norm(p, None, None, training=True)
        for p in parts[::2]
    ]
    one = (parts[1] - x[:8].mean(0)) / (x[:8].var(0) + 1e-5).sqrt()
    z = torch.cat([z[0], one, z[1]]).relu()
    assert_close(model[2].running_mean, z.mean(0), tolerance=1e-5)
    assert_close(model[2].running_var, z.var(0), tolerance=1e-5)


def test_a_branch_that_is_not_reached_keeps_its_statistics():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main = normlib.BatchNorm1d(3)
            self.auxiliary = normlib.BatchNorm1d(3)

        def forward(self, x):
            if self.training:
                self.auxiliary(x)
            return self.main(x)

    model = Auxiliary()
    recalibrate_batch_norm(model, [values(6, 3, mean=2)])
    assert_close(model.auxiliary.running_mean, torch.zeros(3), tolerance=0)
    assert (model.main.running_mean > 0.5).all()
    unreached = nn.Identity()
    unreached.aside = normlib.BatchNorm1d(3)
    with pytest.raises(ValueError, match="reach no layer"):
        recalibrate_batch_norm(unreached, [values(6, 3)])


def test_batches_with_labels_and_as_dictionaries():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = normlib.BatchNorm1d(3)

        def forward(self, pixels, labels=None):
            return self.norm(input=pixels)

    x, labels = values(8, 3, mean=1), torch.arange(8)
    dataset = torch.utils.data.TensorDataset(x, labels)
    loader = torch.utils.data.DataLoader(dataset, batch_size=3)
    for batches in (
        loader,
        [(x, labels)],
        [[x, labels, labels]],
        [{"pixels": x, "labels": labels}],
        iter([x]),
    ):
        model = Named()
        recalibrate_batch_norm(model, batches)
        assert_close(model.norm.running_mean, x.mean(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_statistics_of_a_model_of_another_dtype(dtype):
    layer = normlib.BatchNorm1d(3, dtype=dtype)
    x = values(512, 3, mean=1).to(dtype)
    recalibrate_batch_norm(layer, [x[:500], x[500:]])
    assert layer.running_mean.dtype == dtype
    assert_close(layer.running_mean, x.double().mean(0).to(dtype))
    assert_close(layer.running_var, x.double().var(0).to(dtype))


def test_16_bit_inputs_of_a_float32_layer():
    layer = normlib.BatchNorm1d(3)
    x = values(512, 3, mean=1).half()
    recalibrate_batch_norm(layer, [x])
    assert_close(layer.running_mean, x.double().mean(0).float())


def test_the_variants_are_recalibrated_without_what_training_adds():
    x = values(64, 3, mean=2)
    for layer in (
        variants.NoisyBatchNorm(3, n_mu=50.0),
        variants.GhostBatchNorm(3, virtual_batch_size=4),
        variants.BatchRenorm(3, r_max=3, d_max=3),
        variants.LpBatchNorm(3, p=2),
    ):
        second = copy.deepcopy(layer)
        recalibrate_batch_norm(nn.Sequential(layer, second), [x])
        assert_close(layer.running_var, x.var(0))
        assert_close(second.running_mean, torch.zeros(3), tolerance=1e-6)
    with pytest.raises(ValueError, match=r"layer 'LpBatchNorm'.* not a var"):
        recalibrate_batch_norm(variants.LpBatchNorm(3, p=1), [x])


def test_a_compiled_model_is_recalibrated_and_goes_on():
    model = network().eval()
    compiled = torch.compile(model, backend="eager")
    x = image_batches(8)[0]
    old = compiled(x)
    recalibrate_batch_norm(compiled, [x])
    assert_close(model[1].running_mean, model[0](x).mean((0, 2, 3)))
    assert not torch.allclose(compiled(x), old)
    assert_close(compiled(x), model(x), tolerance=1e-6)


# Adapt


@LIBRARIES
def test_adapting_uses_the_statistics_of_the_domain_and_gives_them_back(
    library,
):
    model = network(library)
    recalibrate_batch_norm(model, image_batches(16, 16))
    x = image_batches(12)[0] * 3 - 5
    before = state_of(model)
    expected = recalibrate_batch_norm(copy.deepcopy(model), [x]).eval()(x)
    with adapt_batch_norm(model, [x]) as inside:
        assert inside is model
        assert not any(m.training for m in model.modules())
        assert_close(model(x), expected)
    assert_unchanged(model, before)


@LIBRARIES
def test_without_batches_each_test_batch_is_its_own_domain(library):
    model = network(library)
    x = image_batches(12)[0]
    before = state_of(model)
    with adapt_batch_norm(model):
        got = model(x)
    assert_unchanged(model, before)
    for m in model.modules():
        m.train(isinstance(m, normlib.modules.BATCH_NORMS))
    assert_close(got, model(x))


def test_a_model_that_changes_its_dtype_inside_gets_its_statistics_back():
    layer = normlib.BatchNorm1d(3)
    layer.running_mean.copy_(values(3))
    expected = layer.running_mean.clone()
    with adapt_batch_norm(layer, [values(8, 3)]):
        layer.double()
    assert layer.running_mean.dtype == torch.float64
    assert_close(layer.running_mean, expected, tolerance=0)


@pytest.mark.parametrize("batches", [None, image_batches(4)])
def test_an_error_inside_gives_the_statistics_back_too(batches):
    model = network()
    before = state_of(model)
    with pytest.raises(Stops), adapt_batch_norm(model, batches):
        raise Stops
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="no batch"):  # noqa: SIM117
        with adapt_batch_norm(model, []):
            pass
    assert_unchanged(model, before)


# Freeze


@LIBRARIES
def test_a_frozen_model_trains_without_its_batch_norm(library):
    model = network(library)
    recalibrate_batch_norm(model, image_batches(16))
    expected = copy.deepcopy(model).eval()
    keys = list(model.state_dict())
    assert freeze_batch_norm(model) is model
    assert list(model.state_dict()) == keys
    model.train()
    model[2].drop.eval()
    model[3][0].drop.eval()
    x = image_batches(1)[0]  # one example is enough now
    assert_close(model(x), expected(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    for name, m in model.named_modules():
        if isinstance(m, FrozenBatchNorm):
            old = expected.get_submodule(name)
            for key, value in m.state_dict().items():
                assert torch.equal(value, old.state_dict()[key])
    assert not torch.equal(model[0].weight, expected[0].weight)


@LIBRARIES
def test_a_frozen_layer_is_the_same_object_with_its_hooks(library):
    model = network(library)
    layer, weight = model[1], model[1].weight
    seen = []
    layer.register_forward_hook(lambda *args: seen.append(args))
    model[4].again = model[2]  # a second name for one block
    freeze_batch_norm(model, affine=False)
    assert model[1] is layer
    assert layer.weight is weight
    assert weight.requires_grad
    assert isinstance(model[4].again.shared, FrozenBatchNorm)
    model(image_batches(2)[0])
    assert len(seen) == 1


def test_a_frozen_layer_stays_so_through_copies_and_pickles():
    model = freeze_batch_norm(network())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.train()
        assert not twin[1].training
        assert not twin[1].weight.requires_grad
    assert freeze_batch_norm(model)[1].training is False  # again
    alone = normlib.BatchNorm1d(3)
    assert freeze_batch_norm(alone) is alone
    frozen = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = image_batches(4)[0]
    model.eval()
    assert_close(frozen(x), model(x), tolerance=1e-5)


def test_a_frozen_layer_can_be_made_like_any_other():
    layer = FrozenBatchNorm(3, eps=0.1)
    assert not layer.training
    x = values(4, 3)
    assert_close(nn.Sequential(layer).train()(x), x / 1.1**0.5)
    assert layer.num_batches_tracked == 0


def test_what_cannot_be_frozen_is_named_and_nothing_changes():
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    subclass = network()
    subclass[3][0].shared = Activated(4)
    parametrized = network()
    nn.utils.parametrize.register_parametrization(
        parametrized[1], "weight", nn.Identity()
    )
    for model, name in (
        (subclass, "'3.0.shared', a Activated"),
        (parametrized, "'1', a ParametrizedBatchNorm2d"),
    ):
        before = state_of(model)
        with pytest.raises(TypeError, match=name):
            freeze_batch_norm(model)
        assert_unchanged(model, before)
        assert not any(isinstance(m, FrozenBatchNorm) for m in model.modules())
        assert all(p.requires_grad for p in model.parameters())


def test_a_subclass_with_its_own_forward_is_recalibrated():
    class Activated(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x).relu()

    x = values(16, 3)
    model = nn.Sequential(Activated(3), nn.BatchNorm1d(3))
    recalibrate_batch_norm(model, [x])
    z = nn.functional.batch_norm(x, None, None, training=True).relu()
    assert_close(model[1].running_mean, z.mean(0))


def test_a_layer_may_name_its_input_as_it_likes():
    class Named(nn.BatchNorm1d):
        def forward(self, mask=None, values=None):
            return super().forward(values)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = Named(3)

        def forward(self, x):
            return self.norm(mask=None, values=x)

    model, x = Model(), values(16, 3)
    recalibrate_batch_norm(model, [x])
    assert_close(model.norm.running_mean, x.mean(0))


def test_everything_public_is_listed():
    for name in inference.__all__:
        assert getattr(inference, name).__doc__.rstrip().endswith("4.")


def test_frozen_layers_can_be_folded_recalibrated_and_adapted():
    model = freeze_batch_norm(network(torch.nn)).eval()
    x = image_batches(8)[0]
    with adapt_batch_norm(model, [x]):
        adapted = model(x)
    recalibrate_batch_norm(model, [x])
    assert_close(model(x), adapted)
    folded = inference.fold_batch_norm(model)
    assert not any(isinstance(m, FrozenBatchNorm) for m in folded.modules())
    assert_close(folded(x), adapted, tolerance=1e-5)
