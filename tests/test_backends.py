import types

import pytest
import torch

from normlib import backends, functional
from normlib.axes import channel_view

X = torch.randn(4, 3)
VIEW = channel_view(X.shape)


def fake(seen, serves=True, pays=True):
    """A backend that serves or declines, and notes that it was called."""

    def normalize(x, *args, **kwargs):
        seen.append(x)
        return backends.eager.normalize(x, *args, **kwargs)

    return types.SimpleNamespace(
        available=lambda: True,
        supports=lambda *args, **kwargs: serves,
        least=lambda *args: 0,
        pays=lambda *args, **kwargs: pays,
        normalize=normalize,
    )


@pytest.fixture
def seen(monkeypatch):
    """What a fake backend was called with; every size is considered."""
    monkeypatch.setattr(backends, "LEAST", 0)
    return []


def install(monkeypatch, module):
    table = {"fake": module, "eager": backends.eager}
    monkeypatch.setattr(backends, "BACKENDS", table)


def test_eager_is_there_and_is_last():
    assert "eager" in backends.available()
    assert list(backends.BACKENDS)[-1] == "eager"


@pytest.mark.parametrize("serves", [True, False])
@pytest.mark.parametrize("pays", [True, False])
def test_the_first_backend_that_serves_and_pays_is_taken(
    monkeypatch, seen, serves, pays
):
    install(monkeypatch, fake(seen, serves, pays))
    functional.normalize(X, VIEW)
    functional.layer_norm(X, (3,))
    assert len(seen) == 2 * (serves and pays)


def test_a_forced_backend_serves_also_where_it_does_not_pay(monkeypatch, seen):
    install(monkeypatch, fake(seen, pays=False))
    with backends.use_backend("fake"):
        functional.layer_norm(X, (3,))
    assert len(seen) == 1


def test_small_calls_are_not_even_considered(monkeypatch):
    install(monkeypatch, fake(seen := []))
    functional.layer_norm(X, (3,))
    assert not seen


def test_a_forced_backend_that_cannot_serve_raises(monkeypatch, seen):
    install(monkeypatch, fake(seen, serves=False))
    with (
        backends.use_backend("fake"),
        pytest.raises(RuntimeError, match=r"'fake'.*\(4, 3\).*float32"),
    ):
        functional.normalize(X, VIEW)
    functional.normalize(X, VIEW)


def test_evaluation_is_the_formulas_or_torchs(monkeypatch, seen):
    install(monkeypatch, fake(seen))
    call = (X, torch.zeros(3), torch.ones(3))
    functional.batch_norm(*call)
    assert not seen
    with (
        backends.use_backend("fake"),
        pytest.raises(RuntimeError, match=r"'fake'.*given statistics"),
    ):
        functional.batch_norm(*call)


def test_forcing_ends_with_its_block_also_after_an_error():
    with pytest.raises(KeyError), backends.use_backend("eager"):
        raise KeyError
    assert backends._forced is None


def test_an_inner_block_gives_back_to_the_outer(monkeypatch):
    install(monkeypatch, fake([]))
    with backends.use_backend("fake"):
        with backends.use_backend("eager"):
            assert backends._forced == "eager"
        assert backends._forced == "fake"


def test_an_unknown_backend_is_named():
    with (
        pytest.raises(ValueError, match=r"'abacus'.*eager"),
        backends.use_backend("abacus"),
    ):
        pass


@pytest.mark.parametrize(
    "call",
    [
        lambda x: functional.batch_norm(x, None, None, training=True),
        lambda x: functional.instance_norm(x),
        lambda x: functional.group_norm(x, 3),
        lambda x: functional.layer_norm(x, (5,)),
        lambda x: functional.rms_norm(x, (5,)),
    ],
    ids=["batch", "instance", "group", "layer", "rms"],
)
def test_every_norm_goes_through_the_same_choice(monkeypatch, seen, call):
    install(monkeypatch, fake(seen))
    call(torch.randn(2, 3, 5))
    assert len(seen) == 1
