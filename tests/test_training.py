import math

import numpy
import pytest
import torch
from torch import nn

from normlib import data, models
from normlib.training import History, accuracy, fit


@pytest.fixture(scope="module")
def digits():
    return data.split(data.digits())


def test_fit_learns_and_says_so(digits):
    model = models.mlp([64, 32, 10])
    history = fit(model, digits, lr=0.3, steps=100)
    assert len(history.loss) == 100
    assert history.loss[-1] < history.loss[0] / 2
    assert history.accuracy > 0.8
    assert not history.diverged


def test_the_same_seed_gives_the_same_run(digits):
    def run(seed):
        model = models.mlp([64, 16, 10], seed=0)
        return fit(model, digits, lr=0.1, steps=15, seed=seed).loss

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_fit_takes_one_step_of_gradient_descent(digits):
    model = nn.Linear(64, 10)
    before = model.weight.detach().clone()
    count = len(digits.x_train)
    x = torch.tensor(digits.x_train, dtype=torch.float32)
    nn.functional.cross_entropy(
        model(x), torch.tensor(digits.y_train)
    ).backward()
    gradient = model.weight.grad.clone()
    fit(model, digits, lr=0.5, steps=1, batch_size=count)
    torch.testing.assert_close(model.weight, before - 0.5 * gradient)


def test_an_epoch_uses_each_example_once(digits):
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            if self.training:
                seen.append(x)
            return super().forward(x)

    small = digits._replace(
        x_train=numpy.arange(12.0)[:, None] * numpy.ones((1, 64)),
        y_train=digits.y_train[:12],
    )
    fit(Spy(64, 10), small, lr=0.0, steps=3, batch_size=4)
    assert sorted(torch.cat(seen)[:, 0].tolist()) == list(range(12))


def test_a_diverged_run_stops_and_is_reported(digits):
    model = models.mlp([64, 32, 32, 10])
    history = fit(model, digits, lr=1e6, steps=100)
    assert history.diverged
    assert len(history.loss) < 100
    assert not math.isfinite(history.loss[-1])
    assert history.accuracy < 0.2


def test_accuracy_is_taken_in_evaluation_mode_and_the_mode_comes_back():
    modes = []

    class Spy(nn.Module):
        def forward(self, x):
            modes.append(self.training)
            return x

    model = Spy().train()
    x = torch.eye(4)
    assert accuracy(model, x, torch.tensor([0, 1, 2, 0])) == 0.75
    assert modes == [False]
    assert model.training


def test_steps_to_averages_over_a_window():
    history = History(loss=[4.0, 0.0, 4.0, 2.0, 1.0, 1.0])
    assert history.steps_to(1.5, window=2) == 5
    assert history.steps_to(1.0, window=1) == 2
    assert history.steps_to(0.5, window=2) is None
    assert history.steps_to(9.0, window=7) is None


def test_a_batch_larger_than_the_data_is_refused_with_both_sizes(digits):
    count = len(digits.x_train)
    with pytest.raises(ValueError, match=f"9999 exceeds {count}"):
        fit(nn.Linear(64, 10), digits, lr=1.0, steps=1, batch_size=9999)
