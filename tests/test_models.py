import pytest
import torch
from torch import nn

import normlib
from normlib import models


def kinds(model):
    return [type(layer).__name__ for layer in model]


@pytest.mark.parametrize(
    ("place", "block"),
    [
        ("before", ["Linear", "BatchNorm1d", "ReLU"]),
        ("after", ["Linear", "ReLU", "BatchNorm1d"]),
    ],
)
def test_the_norm_stands_where_asked(place, block):
    model = models.mlp([4, 5, 6, 3], norm=normlib.BatchNorm1d, place=place)
    assert kinds(model) == block * 2 + ["Linear"]


def test_an_empty_slot_leaves_no_layer():
    assert kinds(models.mlp([4, 5, 3])) == ["Linear", "ReLU", "Linear"]


def test_a_norm_takes_the_place_of_the_bias_it_would_cancel():
    before = models.mlp([4, 5, 3], norm=normlib.BatchNorm1d)
    after = models.mlp([4, 5, 3], norm=normlib.BatchNorm1d, place="after")
    assert before[0].bias is None
    assert before[-1].bias is not None
    assert after[0].bias is not None


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("build", [models.mlp, models.cnn])
def test_the_slot_does_not_change_the_weights(build, place):
    sizes, norm = {
        models.mlp: ([64, 8, 8, 10], nn.BatchNorm1d),
        models.cnn: ([4, 6], nn.BatchNorm2d),
    }[build]
    plain = build(sizes, seed=3)
    normed = build(sizes, norm=norm, place=place, seed=3)

    def weights(model):
        return [p for p in model.parameters() if p.dim() > 1]

    assert all(map(torch.equal, weights(plain), weights(normed)))


def test_the_weights_follow_the_seed_and_nothing_else():
    first = models.mlp([4, 5, 3], seed=1)
    torch.rand(7)
    again, other = models.mlp([4, 5, 3], seed=1), models.mlp([4, 5, 3], seed=2)
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


def test_init_fills_every_weight_and_biases_start_at_zero():
    def threes(weight, generator):
        return nn.init.constant_(weight, 3.0)

    model = models.cnn([4, 6], init=threes)
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            assert (layer.weight == 3).all()
            assert (layer.bias == 0).all()


def test_the_cnn_maps_digits_to_scores_and_halves_the_image_once():
    model = models.cnn([4, 6, 6], norm=normlib.BatchNorm2d)
    x = torch.rand(5, 64)
    assert model(x).shape == (5, 10)
    assert model[:10](x).shape == (5, 6, 4, 4)


@pytest.mark.parametrize("norm", [None, normlib.BatchNorm1d])
def test_an_unknown_place_is_refused_with_its_name(norm):
    with pytest.raises(ValueError, match="between"):
        models.mlp([4, 5, 3], norm=norm, place="between")


@pytest.mark.parametrize(
    ("size", "convolutions", "parameters"),
    [("full", 8, 9_225_610), ("small", 4, 70_762)],
)
def test_vgg_maps_images_to_scores(size, convolutions, parameters):
    model = models.vgg(size)
    assert kinds(model).count("Conv2d") == convolutions
    assert sum(p.numel() for p in model.parameters()) == parameters
    x = torch.rand(2, 3, 32, 32)
    assert model(x).shape == (2, 10)


def test_vgg_has_a_norm_after_each_convolution_and_the_same_weights():
    plain = models.vgg("small", seed=2)
    normed = models.vgg("small", norm=normlib.BatchNorm2d, seed=2)
    block = ["Conv2d", "BatchNorm2d", "ReLU"]
    assert kinds(normed)[:4] == [*block, "MaxPool2d"]
    assert kinds(plain)[:3] == ["Conv2d", "ReLU", "MaxPool2d"]
    assert kinds(normed).count("BatchNorm2d") == 4
    assert normed[0].bias is None
    pairs = [
        [p for p in model.parameters() if p.dim() > 1]
        for model in (plain, normed)
    ]
    assert all(map(torch.equal, *pairs))


def test_an_unknown_vgg_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="size='19' is none of full, small"):
        models.vgg("19")


def test_a_deep_linear_network_is_the_product_of_its_matrices():
    model = models.deep_linear(25, 10).double()
    assert kinds(model) == ["Linear"] * 25
    x = torch.randn(4, 10).double()
    product = torch.eye(10).double()
    for layer in model:
        product = layer.weight @ product
    torch.testing.assert_close(model(x), x @ product.T)


def test_a_deep_linear_network_has_no_norm_behind_its_last_matrix():
    plain = models.deep_linear(3, 4, seed=1)
    normed = models.deep_linear(3, 4, norm=normlib.BatchNorm1d, seed=1)
    assert kinds(normed) == ["Linear", "BatchNorm1d"] * 2 + ["Linear"]
    for i in range(3):
        assert torch.equal(plain[i].weight, normed[2 * i].weight)


def sequences(lengths, features=2, steps=5):
    """Random sequences whose last feature says where they run."""
    x = torch.randn(len(lengths), steps, features + 1)
    x[..., -1] = torch.arange(steps) < torch.tensor(lengths)[:, None]
    return x


@pytest.mark.parametrize("norm", [None, normlib.LayerNorm])
def test_padding_does_not_reach_the_scores(norm):
    model = models.Recurrent(2, 4, 3, norm=norm)
    x = sequences([5, 2])
    other = x.clone()
    other[1, 2:, :-1] = 100.0
    longer = nn.functional.pad(x, (0, 0, 0, 3))
    for changed in (other, longer):
        torch.testing.assert_close(model(changed), model(x))


def test_recurrent_is_its_formula():
    model = models.Recurrent(2, 4, 3, norm=normlib.LayerNorm, seed=1)
    x = sequences([3], steps=3)
    h = torch.zeros(4)
    for step in x[0, :, :2]:
        z = model.inward.weight @ step + model.onward.weight @ h
        h = torch.tanh(model.norms[0](z))
    torch.testing.assert_close(model(x)[0], model.outward(h))


@pytest.mark.parametrize("masked", [False, True])
def test_each_step_has_its_own_statistics_and_late_ones_share(masked):
    model = models.Recurrent(
        2, 4, 3, norm=normlib.BatchNorm1d, steps=3, masked=masked
    )
    model(sequences([5, 4, 2, 2]))
    counts = [int(layer.num_batches_tracked) for layer in model.norms]
    # Masked, the last of five steps has one sequence left and is let be.
    assert counts == [1, 1, 2 if masked else 3]


def test_masked_statistics_see_only_what_runs():
    settings = {"norm": normlib.BatchNorm1d, "steps": 5, "masked": True}
    model = models.Recurrent(2, 4, 3, **settings)
    x = sequences([5, 5, 2])
    other = x.clone()
    other[2, 2:, :-1] = 100.0
    torch.testing.assert_close(model(other), model(x))


@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm2d])
def test_the_slots_of_a_resnet_do_not_change_its_weights(norm):
    def weights(model):
        return [p for p in model.parameters() if p.dim() > 1]

    plain = models.resnet([4, 6], 2, seed=3)
    normed = models.resnet([4, 6], 2, norm=norm, seed=3)
    assert all(map(torch.equal, weights(plain), weights(normed)))


def test_a_resnet_20_has_the_papers_layers_and_parameters():
    """0.27 million parameters (He et al. 2016, table 6)."""
    model = models.resnet([16, 32, 64], 3, norm=normlib.BatchNorm2d)
    of_blocks = [m for m in model if isinstance(m, models.Residual)]
    assert len(of_blocks) == 9
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 2) == 0.27
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 10)


def test_a_resnet_halves_the_image_between_stages():
    model = models.resnet([4, 6, 8], channels=1, norm=nn.BatchNorm2d)
    x = torch.rand(2, 1, 8, 8)
    sides = []
    for layer in model:
        x = layer(x)
        if isinstance(layer, models.Residual):
            sides.append(tuple(x.shape[1:]))
    assert sides == [(4, 8, 8), (6, 4, 4), (8, 2, 2)]


def test_a_residual_block_is_its_formula():
    block = models.Residual(4, 4, norm=normlib.BatchNorm2d)
    x = torch.randn(3, 4, 5, 5)
    y = torch.relu(block.norm1(block.conv1(x)))
    y = block.norm2(block.conv2(y))
    torch.testing.assert_close(block(x), torch.relu(y + x))
