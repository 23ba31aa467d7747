import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import normlib
from normlib.stats import (
    CumulativeAverage,
    ExponentialAverage,
    Moments,
    Population,
    center,
    update_running,
)
from normlib.testing import assert_close


def sample(n, seed=0, mean=0.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=g, dtype=torch.float64) + mean


def test_moments_are_the_mean_and_the_biased_variance():
    x = sample(11)
    m = Moments.of(x, [0])
    assert m.count == 11
    assert_close(m.mean, x.mean(0, keepdim=True))
    assert_close(m.var, x.var(0, correction=0, keepdim=True))
    assert_close(m.unbiased_var, x.var(0, keepdim=True))


def test_not_centered_is_the_mean_square():
    x = sample(11, mean=3.0)
    m = Moments.about_zero(x, [0])
    assert_close(m.var, x.square().mean(0, keepdim=True))
    assert_close(m.mean, torch.zeros(1, 3, dtype=torch.float64))


@given(
    cuts=st.lists(st.integers(1, 39), max_size=5, unique=True),
    mean=st.sampled_from([0.0, 10.0, 1e6]),
)
def test_however_a_sample_is_cut_its_parts_merge_to_the_whole(cuts, mean):
    x = sample(40, mean=mean)
    parts = [p for p in x.tensor_split(sorted(cuts)) if len(p)]
    merged = Moments.of(parts[0], [0])
    for part in parts[1:]:
        merged = merged.merge(Moments.of(part, [0]))
    whole = Moments.of(x, [0])
    assert merged.count == 40
    assert_close(merged.mean, whole.mean, tolerance=1e-12)
    assert_close(merged.var, whole.var, tolerance=1e-9)


def test_an_infinite_mean_is_infinite():
    m = Moments.of(torch.tensor([1.0, torch.inf, -2.0]), [0])
    assert m.mean == torch.inf
    assert m.var.isnan()


def test_merging_does_not_care_about_the_order():
    a, b = Moments.of(sample(5, 1), [0]), Moments.of(sample(9, 2, 4.0), [0])
    assert_close(a.merge(b).var, b.merge(a).var)
    assert_close(a.merge(b).mean, b.merge(a).mean)


def test_one_value_has_no_unbiased_variance():
    one = Moments.of(sample(1), [0])
    assert not one.unbiased_var.isfinite().any()


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4, 1e6])
def test_centering_twice_leaves_no_mean_however_far(mean):
    x = sample(1000).float() + mean
    exact = x.double() - x.double().mean(0)
    assert_close(center(x, [0])[0], exact, tolerance=1e-6)


def test_centering_has_the_gradient_of_centering():
    x = sample(5, mean=3.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: center(x, [0])[0], [x])
    assert torch.autograd.gradcheck(lambda x: Moments.of(x, [0])[1:], [x])
    assert torch.autograd.gradgradcheck(lambda x: center(x, [0])[1].var, [x])


def test_two_passes_keep_the_digits_that_one_pass_loses():
    x = sample(1000).float() + 1e4
    exact = x.double().var(0, correction=0, keepdim=True)
    one_pass = x.square().mean(0) - x.mean(0).square()
    assert_close(Moments.of(x, [0]).var, exact.float(), tolerance=1e-4)
    assert (one_pass - exact).abs().max() > 1


@pytest.mark.parametrize("momentum", [0.1, 1.0, torch.tensor(0.25)])
def test_running_statistics_move_by_the_momentum(momentum):
    mean, var = torch.zeros(3), torch.ones(3)
    x = sample(8, mean=2.0).float()
    update_running(mean, var, Moments.of(x, [0]), momentum)
    m = float(momentum)
    assert_close(mean, m * x.mean(0))
    assert_close(var, 1 - m + m * x.var(0))


def test_one_over_t_is_the_cumulative_average():
    mean, var = torch.zeros(3), torch.ones(3)
    batches = [sample(6, seed).float() for seed in range(5)]
    for t, x in enumerate(batches, start=1):
        update_running(mean, var, Moments.of(x, [0]), 1 / t)
    assert_close(mean, torch.stack([x.mean(0) for x in batches]).mean(0))
    assert_close(var, torch.stack([x.var(0) for x in batches]).mean(0))


def test_an_empty_batch_changes_nothing():
    mean, var = torch.zeros(3), torch.ones(3)
    update_running(mean, var, Moments.of(torch.empty(0, 3), [0]), 0.1)
    assert_close(mean, torch.zeros(3), tolerance=0)
    assert_close(var, torch.ones(3), tolerance=0)


def updated(estimate, batches, dtype=None):
    for x in batches:
        estimate.update(Moments.of(x, [0], dtype))
    return estimate


def drifting(*sizes):
    """Batches whose mean moves on, in float32."""
    return [sample(n, i, 1.0 + i).float() for i, n in enumerate(sizes)]


@pytest.mark.parametrize("library", [normlib, torch.nn])
@pytest.mark.parametrize("momentum", [0.1, 0.01, 1.0, None])
def test_the_averages_are_what_batch_norm_keeps(library, momentum):
    layer = library.BatchNorm1d(3, momentum=momentum)
    batches = drifting(4, 7, 5)
    for x in batches:
        layer(x)
    average = (
        CumulativeAverage()
        if momentum is None
        else ExponentialAverage(momentum)
    )
    updated(average, batches)
    assert average.steps == layer.num_batches_tracked
    assert_close(average.mean.flatten(), layer.running_mean)
    assert_close(average.var.flatten(), layer.running_var)


def test_a_decay_weighs_the_past_and_the_variance_is_biased():
    average = updated(ExponentialAverage.with_decay(0.99), drifting(5, 9))
    mean, var = torch.zeros(3), torch.ones(3)
    for x in drifting(5, 9):
        mean = 0.99 * mean + 0.01 * x.mean(0)
        var = 0.99 * var + 0.01 * x.var(0, correction=0)
    assert_close(average.mean.flatten(), mean)
    assert_close(average.var.flatten(), var)
    assert average.missing == pytest.approx(0.99**2)


def test_a_decay_can_be_without_the_start_and_unbiased():
    (x,) = drifting(5)
    for unbiased in (False, True):
        average = ExponentialAverage.with_decay(
            0.9, unbiased=unbiased, debias=True
        )
        var = updated(average, [x]).var
        assert_close(var.flatten(), x.var(0, correction=int(unbiased)))


@pytest.mark.parametrize("momentum", [0.01, 0.5, 1.0])
def test_without_the_start_the_weights_of_the_batches_sum_to_one(momentum):
    batches = drifting(4, 7, 5)
    average = updated(ExponentialAverage(momentum, debias=True), batches)
    weights = momentum * (1 - momentum) ** torch.arange(2.0, -1.0, -1.0)
    weights /= weights.sum()
    for got, each in (
        (average.mean, [x.mean(0) for x in batches]),
        (average.var, [x.var(0) for x in batches]),
    ):
        expected = (weights[:, None] * torch.stack(each)).sum(0)
        assert_close(got.flatten(), expected, tolerance=1e-4)


def test_one_step_without_the_start_is_the_batch():
    x = sample(9, mean=4.0)
    average = updated(ExponentialAverage(0.001, debias=True), [x])
    assert_close(average.mean.flatten(), x.mean(0), tolerance=1e-9)
    assert_close(average.var.flatten(), x.var(0), tolerance=1e-9)


@given(
    cuts=st.lists(st.integers(1, 39), max_size=5, unique=True),
    mean=st.sampled_from([0.0, 1e3, 1e6]),
)
def test_a_population_is_exact_in_float32_however_it_comes(cuts, mean):
    x = (sample(40) + mean).float()
    parts = x.tensor_split(sorted(cuts))
    found = updated(Population(), parts, torch.float64)
    assert found.count == 40
    exact = x.double()
    far = found.mean.flatten() - exact.mean(0)
    assert far.abs().max() < 1e-6  # float32 would be 0.03 off at 1e6
    assert_close(
        found.var.flatten(), exact.var(0, correction=0), tolerance=1e-6
    )
    assert_close(found.unbiased_var.flatten(), exact.var(0), tolerance=1e-6)


def test_averaged_variances_miss_what_lies_between_the_batches():
    batches = drifting(6, 6, 6, 6)
    whole = torch.cat(batches).double()
    average = updated(CumulativeAverage(unbiased=False), batches)
    between = torch.stack([x.mean(0) for x in batches]).var(0, correction=0)
    assert between.min() > 0.5
    assert_close(
        average.var.flatten() + between, whole.var(0, correction=0).float()
    )
    assert_close(average.mean.flatten(), whole.mean(0).float())


ESTIMATES = pytest.mark.parametrize(
    "make", [ExponentialAverage, CumulativeAverage, Population]
)


@ESTIMATES
def test_an_estimate_has_nothing_to_say_before_the_first_batch(make):
    with pytest.raises(RuntimeError, match=f"{make.__name__} has seen no"):
        _ = make().mean
    estimate = updated(make(), [torch.empty(0, 3)])
    with pytest.raises(RuntimeError, match="no batch yet"):
        _ = estimate.var


@ESTIMATES
def test_a_batch_that_does_not_fit_changes_nothing(make):
    estimate = updated(make(), drifting(5))
    mean, var = estimate.mean, estimate.var
    with pytest.raises(ValueError, match=r"\(1, 2\) do not .* \(1, 3\)"):
        estimate.update(Moments.of(torch.ones(4, 2), [0]))
    assert_close(estimate.mean, mean, tolerance=0)
    assert_close(estimate.var, var, tolerance=0)


@pytest.mark.parametrize("make", [ExponentialAverage, CumulativeAverage])
def test_one_value_is_refused_where_the_variance_is_to_be_unbiased(make):
    with pytest.raises(ValueError, match="count=1"):
        make().update(Moments.of(torch.ones(1, 3), [0]))
    biased = updated(make(unbiased=False), [torch.ones(1, 3)])
    assert biased.steps == 1


@pytest.mark.parametrize("momentum", [0.0, -0.1, 1.1, float("nan")])
def test_a_momentum_is_a_weight(momentum):
    with pytest.raises(ValueError, match=f"but got {momentum}"):
        ExponentialAverage(momentum)


@ESTIMATES
@pytest.mark.parametrize("batches", [1, 2])
def test_an_estimate_keeps_no_graph(make, batches):
    x = sample(5).requires_grad_()
    estimate = updated(make(), [x] * batches)
    assert not estimate.mean.requires_grad
    assert not estimate.var.requires_grad


@ESTIMATES
def test_an_estimate_shares_no_memory(make):
    batch, estimate = Moments.of(sample(5), [0]), make()
    estimate.update(batch)
    mean, var = estimate.mean.clone(), estimate.var.clone()
    for tensor in (batch.mean, batch.var, estimate.mean, estimate.var):
        tensor.add_(1)
    assert_close(estimate.mean, mean, tolerance=0)
    assert_close(estimate.var, var, tolerance=0)


def test_an_empty_sample_adds_nothing():
    empty, some = Moments.of(sample(0), [0]), Moments.of(sample(4), [0])
    for merged in (empty.merge(some), some.merge(empty)):
        assert merged.count == 4
        assert_close(merged.mean, some.mean, tolerance=0)
        assert_close(merged.var, some.var, tolerance=0)
    assert empty.merge(empty).count == 0


@pytest.mark.parametrize("make", [ExponentialAverage, CumulativeAverage])
def test_an_average_of_16_bit_statistics_arrives(make):
    args = (0.01,) if make is ExponentialAverage else ()
    average = make(*args)
    x = torch.full((4, 3), 5.0, dtype=torch.bfloat16)
    for _ in range(1000):
        average.update(Moments.of(x, [0]))
    assert average.mean.dtype == torch.float32
    assert_close(average.mean, torch.full((1, 3), 5.0), tolerance=1e-3)
