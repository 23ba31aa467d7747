import types

import pytest
import torch

from normlib import backends, functional
from normlib.axes import channel_view

X = torch.randn(4, 3)
VIEW = channel_view(X.shape)


def fake(serves, seen):
    """A backend that serves or declines, and notes that it was called."""

    def normalize(x, *args, **kwargs):
        seen.append(x)
        return backends.eager.normalize(x, *args, **kwargs)

    return types.SimpleNamespace(
        available=lambda: True,
        supports=lambda *args, **kwargs: serves,
        normalize=normalize,
    )


def test_eager_is_there_and_is_last():
    assert "eager" in backends.available()
    assert list(backends.BACKENDS)[-1] == "eager"


@pytest.mark.parametrize("serves", [True, False])
def test_the_first_backend_that_serves_is_taken(monkeypatch, serves):
    seen = []
    table = {"fake": fake(serves, seen), "eager": backends.eager}
    monkeypatch.setattr(backends, "BACKENDS", table)
    functional.normalize(X, VIEW)
    assert len(seen) == serves


def test_a_forced_backend_that_cannot_serve_raises(monkeypatch):
    seen = []
    table = {"fake": fake(False, seen), "eager": backends.eager}
    monkeypatch.setattr(backends, "BACKENDS", table)
    with (
        backends.use_backend("fake"),
        pytest.raises(RuntimeError, match=r"'fake'.*\(4, 3\).*float32"),
    ):
        functional.normalize(X, VIEW)
    functional.normalize(X, VIEW)


def test_forcing_ends_with_its_block_also_after_an_error():
    with pytest.raises(KeyError), backends.use_backend("eager"):
        raise KeyError
    assert backends._forced is None


def test_an_inner_block_gives_back_to_the_outer(monkeypatch):
    table = {"fake": fake(True, []), "eager": backends.eager}
    monkeypatch.setattr(backends, "BACKENDS", table)
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


def test_batch_norm_goes_through_the_same_choice(monkeypatch):
    seen = []
    table = {"fake": fake(True, seen), "eager": backends.eager}
    monkeypatch.setattr(backends, "BACKENDS", table)
    functional.batch_norm(X, None, None, training=True)
    assert len(seen) == 1
