"""The benchmark of speed: what it computes of its measurements."""

import sys

import numpy
import pytest
import torch

from benchmarks import speed


@pytest.mark.parametrize(
    "row",
    dict.fromkeys(speed.ROWS + speed.GPU_ROWS),
    ids=lambda row: row.title,
)
def test_each_row_is_served_by_both_libraries(row):
    """On a slice of it: shapes, layout, parameters and the exact values."""
    x, dy = speed.data(row, torch.float32, "cpu", limit=2**10)
    for library in (torch.nn, speed.normlib):
        y, dx, *_ = speed.Call(row, library, x, dy).both()
        assert y.shape == dx.shape == x.shape
    assert row._replace(shape=tuple(x.shape)).view.count(False) > 0
    assert row.why


def test_rows_are_not_repeated():
    for rows in (speed.ROWS, speed.GPU_ROWS):
        titles = [row.title for row in rows]
        assert len(set(titles)) == len(titles)


def test_errors_are_a_share_of_the_largest_value():
    exact = numpy.array([0.0, -4.0])
    assert speed.error(torch.tensor([1.0, -4.0]), exact) == 0.25
    assert speed.error(torch.tensor([0.0, 0.5]), exact / 8) == 1.0
    assert numpy.isnan(speed.error(torch.tensor([0.0, torch.nan]), exact))


def check(ours, torchs, dtype="float32"):
    return {
        "title": "",
        "dtype": dtype,
        "errors": {"normlib": {"y": ours}, "torch": {"y": torchs}},
    }


@pytest.mark.parametrize(
    ("ours", "torchs", "share"),
    [
        (3e-4, 2e-4, 1.5),
        (6e-7, 4e-7, 1.0),
        (2e-6, 5e-7, 4.0),
        (1e-9, 1e-12, 1 / 1.5),
    ],
)
def test_a_share_of_the_error_allows_for_rounding(ours, torchs, share):
    assert speed.worst(check(ours, torchs)) == pytest.approx(share)


def test_an_error_of_the_method_is_told_from_rounding():
    torchs = {"y": 1e-7}
    assert not speed.unsound({"y": 5e-5}, torchs, torch.float32)
    assert speed.unsound({"y": 1e-2}, torchs, torch.float32)
    assert speed.unsound({"y": float("nan")}, torchs, torch.float32)


def line(layer, ours, torchs, **changed):
    results = {
        "torch": {"ms": [torchs] * 3, "ratio": 1.0},
        "normlib": {"ms": [ours] * 3, "ratio": torchs / ours},
    }
    return {
        "layer": layer,
        "title": layer,
        "shape": [8, 8, 8, 8],
        "options": {},
        "channels_last": False,
        "training": True,
        "dtype": "float32",
        "pass": "both",
        "elements": 2**20,
        "results": results,
        "memory": {"torch": 1000, "normlib": 900},
        **changed,
    }


def judged(*lines, checks=(), device="cpu"):
    goals = speed.judge(list(lines), list(checks), device)
    return {g["goal"].split(",")[0]: g for g in goals}


def test_a_goal_is_judged_by_its_worst_line():
    goals = judged(
        line("BatchNorm2d", 1.0, 2.0),
        line("BatchNorm2d", 1.0, 1.4, title="worst"),
        line("RMSNorm", 1.0, 2.5),
    )
    batch = goals["BatchNorm over positions"]
    assert not batch["met"]
    assert batch["number"] == pytest.approx(1.4)
    assert batch["where"].startswith("worst")
    assert goals["RMSNorm"]["met"]
    assert goals["InstanceNorm"]["number"] is None
    assert goals["nowhere slower"]["met"]


@pytest.mark.parametrize(
    "changed",
    [
        {"elements": 2**20 - 1},
        {"dtype": "bfloat16"},
        {"training": False},
        {"channels_last": True},
        {"shape": [4096, 512]},
        {"pass": "forward"},
    ],
    ids=str,
)
def test_the_goal_of_batch_norm_is_for_large_images_in_training(changed):
    goals = judged(line("BatchNorm2d", 1.0, 1.0, **changed))
    assert goals["BatchNorm over positions"]["number"] is None


def test_small_calls_are_judged_by_microseconds():
    goals = judged(line("LayerNorm", 0.056, 0.05))
    small = goals["microseconds more"]
    assert small["number"] == pytest.approx(6.0)
    assert not small["met"]
    assert goals["nowhere slower"]["number"] is None


def test_memory_and_errors_are_judged_against_torchs():
    memory = {"torch": 100, "normlib": 150}
    goals = judged(
        line("LayerNorm", 1.0, 1.0, memory=memory),
        checks=[check(3e-4, 2e-4)],
    )
    assert goals["memory"]["number"] == 1.5
    assert not goals["memory"]["met"]
    assert goals["error"]["number"] == 1.5
    assert not goals["error"]["met"]


def test_a_gpu_is_judged_by_its_memory_and_by_the_best_of_the_others():
    large = line("LayerNorm", 1.0, 1.5, elements=2**24)
    results = large["results"]
    results["normlib"]["share"] = 0.8
    results["compiled"] = {"ms": [0.9] * 3, "ratio": 1.5 / 0.9}
    tiny = line("RMSNorm", 1.0, 0.9, elements=2**10)
    goals = judged(large, tiny, device="cuda")
    share = goals["share of a copy's speed"]
    assert (share["number"], share["met"]) == (0.8, False)
    lead = goals["against the best of the others"]
    assert (lead["number"], lead["met"]) == (0.9, False)
    small = goals["against torch.nn"]
    assert small["where"].startswith("RMSNorm")
    assert not small["met"]


def test_the_compiled_formula_is_the_layer(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    row = speed.Row("GroupNorm", (2, 6, 4, 4), "", speed.groups(3))
    x, dy = speed.data(row, torch.float32, "cpu")
    ours = speed.Compiled(row, x, dy).both()
    theirs = speed.Call(row, torch.nn, x, dy).both()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_samples_are_taken_in_rounds_of_changing_order():
    order = []
    each = {name: lambda times, n=name: order.append(n) for name in "abc"}
    samples = speed.interleaved(each, "cpu", budget=0.0)
    assert {len(told) for told in samples.values()} == {15}
    timed = order[6:]  # each was warmed up and timed once
    rounds = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 3


def test_memory_is_what_is_held_at_once():
    def twice():
        first = torch.empty(1000)
        del first
        torch.empty(3000)

    assert 12_000 <= speed.traced_peak(twice) < 13_000


def test_the_allocator_is_pinned_once(monkeypatch):
    started = []
    monkeypatch.setattr(
        speed.os, "execv", lambda *args: started.append(args[1])
    )
    monkeypatch.setattr(sys, "argv", ["speed", "--quick"])
    for name in speed.PINNED:
        monkeypatch.setenv(name, "")
    speed.pin()
    assert started[0][1:] == ["-m", "benchmarks.speed", "--quick"]
    speed.pin()
    assert len(started) == 1
