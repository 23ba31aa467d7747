"""The benchmark of speed: what it computes of its measurements."""

import json
import subprocess
import sys
import types

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
        "torch": {"ms": [torchs] * 3, "ratio": 1.0, "wall": torchs},
        "normlib": {"ms": [ours] * 3, "ratio": torchs / ours, "wall": ours},
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
    small = goals["calls in a row"]
    assert small["where"].startswith("RMSNorm")
    assert not small["met"]


GROUP = speed.Row("GroupNorm", (2, 6, 4, 4), "", speed.groups(3))
FUSED = [
    GROUP._replace(beside="relu"),
    GROUP._replace(beside="silu"),
    speed.Row("LayerNorm", (3, 8), "", beside="add"),
    speed.Row("RMSNorm", (3, 8), "", beside="add"),
]
by_title = {"ids": lambda row: row.title}


@pytest.mark.parametrize("row", [GROUP, *FUSED], **by_title)
def test_the_compiled_formula_is_the_layer(row, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    x, dy = speed.data(row, torch.float32, "cpu")
    ours = speed.Compiled(row, x, dy).both()
    theirs = speed.Call(row, torch.nn, x, dy).both()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("row", FUSED, **by_title)
def test_what_is_fused_is_validated_against_numpy(row):
    x, dy = speed.data(row, torch.float64, "cpu")
    for library in (torch.nn, speed.normlib):
        call = speed.Call(row, library, x, dy)
        exact = speed.exactly(row, call)
        for got, wanted in zip(call.both(), exact, strict=False):
            assert speed.error(got, wanted) < 1e-12
    assert row.passes(True) == {"add": 8}.get(row.beside, 5)


def test_the_validation_keeps_off_a_kink():
    row = GROUP._replace(beside="relu")
    x, dy = speed.data(row, torch.float32, "cpu")
    kept = speed.off_the_kink(row, x, dy)
    z = speed.Call(GROUP, torch.nn, x, dy).forward()
    assert torch.equal(kept == 0, z.abs() < 0.05)
    assert 0 < (kept == 0).sum() < 20
    assert speed.off_the_kink(GROUP, x, dy) is dy


class FakeLiger:
    """Liger-Kernel's functions with the arguments that 0.8 has."""

    @staticmethod
    def liger_layer_norm(X, W, B, eps):
        return torch.nn.functional.layer_norm(X, W.shape, W, B, eps)

    @staticmethod
    def liger_rms_norm(
        X, W, eps, offset=0.0, casting_mode="llama", in_place=True
    ):
        assert not in_place  # dY would be another's
        return torch.nn.functional.rms_norm(X, W.shape, W, eps)

    @staticmethod
    def liger_fused_add_rms_norm(
        X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True
    ):
        assert not in_place
        return torch.nn.functional.rms_norm(X + R, W.shape, W, eps), X + R

    @staticmethod
    def liger_group_norm(X, W, B, num_channels, num_groups, eps):
        assert num_channels == X.shape[1]
        return torch.nn.functional.group_norm(X, num_groups, W, B, eps)


def test_liger_is_given_what_its_functions_take(monkeypatch):
    monkeypatch.setattr(speed, "liger", lambda: FakeLiger)
    served = [row for row in speed.GPU_ROWS if speed.Liger.serves_row(row)]
    assert {row.name for row in served} == {
        *("LayerNorm", "RMSNorm", "AddRMSNorm", "GroupNorm")
    }
    for row in served:
        x, dy = speed.data(row, torch.float32, "cpu", limit=2**10)
        ours = speed.Liger(row, x, dy).both()
        theirs = speed.Call(row, torch.nn, x, dy).both()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    for row in speed.GPU_ROWS:
        if row.last or row.beside == "silu" or row.options == speed.PLAIN:
            assert not speed.Liger.serves_row(row)


def test_without_liger_a_line_says_so_and_nothing_ends(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    speed.liger.cache_clear()
    assert speed.liger() is None
    assert not speed.Liger.serves_row(GROUP)
    assert "without Liger-Kernel" in capsys.readouterr().out
    speed.liger.cache_clear()


def test_what_fails_of_another_project_is_left_out(capsys):
    def fails(*args):
        raise RuntimeError("out of shared memory")

    x, dy = speed.data(GROUP, torch.float32, "cpu")
    assert speed.tried("liger", fails, GROUP, x, dy) == {}
    told = capsys.readouterr().out
    assert "GroupNorm 3 2x6x4x4 not by liger: out of shared memory" in told


def test_normlib_is_judged_beside_the_best_of_all():
    each = line("LayerNorm", 1.0, 1.5, elements=2**24)
    each["results"]["liger"] = {"ms": [0.5] * 3, "ratio": 3.0}
    assert speed.lead(each) == pytest.approx(0.5)
    del each["results"]["liger"]
    assert speed.lead(each) == pytest.approx(1.5)


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
    speed.ready("cpu")
    assert started[0][1:] == ["-m", "benchmarks.speed", "--quick"]
    speed.ready("cpu")
    assert len(started) == 1


def visit(torchs, ours):
    """A second for each sample of torch.nn, both passes twice as long."""
    samples = {
        backward: {
            "torch": [torchs * (1 + backward)] * 3,
            "normlib": [ours * (1 + backward)] * 3,
        }
        for backward in (False, True)
    }
    memory = {"torch": 8, "normlib": 8}
    return speed.Measured(samples, memory, {False: {}, True: {}})


def test_what_one_visit_met_does_not_decide():
    row, visits = speed.ROWS[0], [visit(3.0, 2.0), visit(9.0, 9.0)]
    visits += [visit(4.0, 2.0)]
    forward, both = speed.lines_of(row, torch.float32, visits, copy=1e9)
    assert forward["samples"] == 9
    told = forward["results"]["normlib"]
    assert told["ratio"] == 1.5
    assert told["ms"][1] == 2000.0
    assert both["results"]["torch"]["ms"][1] == 8000.0
    assert told["gbs"] == round(3 * 4 * row.elements / 2.0 / 1e9, 2)
    assert forward["memory"] is None
    assert both["memory"]["normlib"] == 8
    assert "wall" not in told


def test_a_run_that_is_broken_off_leaves_what_it_reached(
    monkeypatch, tmp_path
):
    def measure(row, dtype, *args):
        if row == speed.QUICK[1]:
            raise KeyboardInterrupt
        return visit(1.0, 1.0)

    monkeypatch.setattr(speed, "ready", lambda device: None)
    monkeypatch.setattr(speed, "measure", measure)
    argv = ["speed", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(KeyboardInterrupt):
        speed.main()
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text("utf-8"))
    reached = {speed.QUICK[0].title}
    assert {line["title"] for line in record["speed"]} == reached
    assert {check["title"] for check in record["checks"]} == reached
    others = sorted(row.title for row in speed.QUICK[1:])
    assert record["missing"] == others


def test_the_tests_of_a_gpu_are_run_by_their_files(monkeypatch, capsys):
    commands = []

    def run(command, **options):
        commands.append(command)
        return types.SimpleNamespace(stdout="...\n7 passed\n", stderr="")

    monkeypatch.setattr(speed.subprocess, "run", run)
    assert speed.tested() == "7 passed"
    assert "7 passed" in capsys.readouterr().out
    files = {path for path in commands[0] if path.endswith(".py")}
    names = {path.rpartition("test_")[2] for path in files}
    assert {"triton.py", "fused_forms.py", "functional.py"} <= names
    assert "speed.py" not in names

    def late(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(speed.subprocess, "run", late)
    assert "broken off after 240 s" in speed.tested()
