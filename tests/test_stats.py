import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from normlib.stats import Moments, center, update_running
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
