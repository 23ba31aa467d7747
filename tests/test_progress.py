import sys

import pytest
import torch

import normlib
from normlib.diagnostics import gradient_walk
from normlib.inference import recalibrate_batch_norm
from normlib.progress import progress

tqdm = pytest.importorskip("tqdm")
BATCHES = [torch.eye(4, 3)] * 3


@pytest.fixture
def impatient(monkeypatch):
    """Two seconds have passed as soon as it begins."""
    init = tqdm.tqdm.__init__

    def patched(self, *args, **kwargs):
        init(self, *args, **{**kwargs, "delay": 0, "mininterval": 0})

    monkeypatch.setattr(tqdm.tqdm, "__init__", patched)


def on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


def walk():
    layer = torch.nn.Linear(3, 1)
    gradient_walk(layer, torch.mean, BATCHES[0], [0.1, 0.2])


def recalibrate(**options):
    recalibrate_batch_norm(normlib.BatchNorm1d(3), BATCHES, **options)


def test_what_takes_no_time_shows_no_bar(capsys, monkeypatch):
    on_a_terminal(monkeypatch)
    assert list(progress([1, 2], "work", "items", show=True)) == [1, 2]
    walk()
    recalibrate()
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("impatient")
def test_recalibrating_shows_a_bar_unless_told_not_to(capsys):
    recalibrate()
    assert "3/3" in capsys.readouterr().err
    recalibrate(progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("impatient")
def test_a_measurement_shows_a_bar_on_a_terminal(capsys, monkeypatch):
    on_a_terminal(monkeypatch)
    walk()
    heard = capsys.readouterr().err
    assert "gradient walk: 100%" in heard
    assert "2/2" in heard


@pytest.mark.usefixtures("impatient")
def test_a_measurement_leaves_nothing_in_a_notebook(capsys):
    walk()
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("impatient")
def test_without_tqdm_the_items_come_all_the_same(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(progress(iter([1, 2]), "work", "items", show=True)) == [1, 2]
    recalibrate()
    assert capsys.readouterr().err == ""
