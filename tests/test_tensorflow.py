"""tf.nn's pair and Keras' layer, by values recorded from TensorFlow."""

import json
import pathlib

import numpy
import pytest
import torch

import normlib
from normlib.functional import batch_normalization, moments
from normlib.testing import assert_close

GOLDEN = json.loads(
    (pathlib.Path(__file__).parent / "golden/tensorflow.json").read_text()
)


@pytest.fixture(params=GOLDEN["cases"])
def case(request):
    values = GOLDEN["cases"][request.param]
    return {
        key: torch.tensor(value, dtype=torch.float64)
        if isinstance(value, list) and key not in ("axes", "keepdims_shape")
        else value
        for key, value in values.items()
    }


def test_the_golden_file_says_where_it_comes_from():
    origin = GOLDEN["origin"]
    assert {"tensorflow", "keras", "date", "script"} <= set(origin)


def test_moments_equal_tensorflow(case):
    mean, variance = moments(case["x"], case["axes"])
    assert_close(mean, case["mean"])
    assert_close(variance, case["variance"])
    kept = moments(case["x"], case["axes"], keepdims=True)
    assert list(kept[0].shape) == case["keepdims_shape"]


def test_batch_normalization_equals_tensorflow(case):
    y = batch_normalization(
        case["x"],
        case["mean"],
        case["variance"],
        case["offset"],
        case["scale"],
        case["variance_epsilon"],
    )
    assert_close(y, case["y"])


def test_offset_before_scale_the_other_order_is_silently_wrong(case):
    swapped = batch_normalization(
        case["x"],
        case["mean"],
        case["variance"],
        case["scale"],
        case["offset"],
        case["variance_epsilon"],
    )
    assert (swapped - case["y"]).abs().max() > 0.1


def test_a_keras_layer_is_ours_with_its_conventions(case):
    """Epsilon 1e-3, momentum .99 for our .01, and a biased moving variance."""
    x = case["x"].movedim(-1, 1)
    c = x.shape[1]
    layer = normlib.BatchNorm(
        c,
        eps=case["keras_epsilon"],
        momentum=1 - case["keras_momentum"],
        dtype=torch.float64,
    )
    with torch.no_grad():
        layer.weight.copy_(case["scale"])
        layer.bias.copy_(case["offset"])
    assert_close(layer(x), case["keras_training"].movedim(-1, 1))
    assert_close(layer.running_mean, case["keras_moving_mean"])
    n = x.numel() // c
    ours = layer.running_var - 0.99
    theirs = case["keras_moving_variance"] - 0.99
    assert_close(ours, theirs * n / (n - 1))


def test_a_number_for_the_axes_is_one_axis():
    x = torch.randn(4, 3)
    assert_close(moments(x, 0), moments(x, [0]))


def test_both_axes_give_one_number_for_everything():
    mean, _ = moments(torch.randn(4, 3), [0, 1])
    assert mean.shape == ()


def test_over_no_axes_each_value_is_its_own_mean():
    """As TensorFlow 2.21 does, where torch's mean would take all axes."""
    x = torch.randn(2, 2)
    mean, variance = moments(x, [])
    assert torch.equal(mean, x)
    assert not variance.any()


def test_an_integer_of_numpy_is_an_axis():
    x = torch.randn(4, 3)
    assert_close(moments(x, numpy.int64(1)), moments(x, [1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_computed_in_thirty_two(dtype):
    x = (torch.randn(64, 3) * 30 + 200).to(dtype)
    pair = moments(x, [0])
    wide = moments(x.float(), [0])
    assert all(p.dtype == dtype for p in pair)
    pairs = zip(pair, wide, strict=True)
    assert all(torch.equal(p, w.to(dtype)) for p, w in pairs)
    parts = [torch.tensor(v).to(dtype) for v in (1.0, 6e4, 0.5, 300.0)]
    y = batch_normalization(x, *parts, 1e4)
    wide = batch_normalization(x.float(), *(p.float() for p in parts), 1e4)
    assert torch.equal(y, wide.to(dtype))


def test_an_epsilon_of_zero_is_taken():
    x = torch.tensor([1.0, 3.0])
    y = batch_normalization(x, *moments(x, [0]), None, None, 0.0)
    assert_close(y, torch.tensor([-1.0, 1.0]))


def test_bad_input_is_refused():
    x = torch.ones(2, 3)
    with pytest.raises(NotImplementedError, match="int64"):
        moments(x.long(), [0])
    with pytest.raises(NotImplementedError, match="int64"):
        batch_normalization(x.long(), 0, 1, None, None, 1e-3)
    with pytest.raises(ValueError, match="-1"):
        batch_normalization(x, x, x, None, None, -1.0)
