"""The records of the benchmarks: each one complete, and made as they say."""

import datetime
import json
import pathlib
import re
import sys

import folding_record
import gpu_record
import nbformat
import pytest

from benchmarks import chapters, folding, provenance, reproduce, speed

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "benchmarks" / "records").glob("*.json"))
ABOUT = {
    "kind": str,
    "device": str,
    "driver": str | None,
    "cuda": str | None,
    "torch": str,
    "python": str,
    "platform": str,
    "threads": int,
    "commit": str,
    "dirty": bool,
    "date": str,
    "command": str,
}
COMPARISON = {
    "name": str,
    "device": str,
    "dtype": str,
    "difference": float,
    "tolerance": float,
}


LINE = {
    "layer": str,
    "title": str,
    "why": str,
    "shape": list,
    "options": dict,
    "channels_last": bool,
    "training": bool,
    "dtype": str,
    "pass": str,
    "elements": int,
    "samples": int,
    "results": dict,
    "memory": dict | None,
}
RESULT = {"ms": list, "gbs": float, "share": float, "ratio": float}
CHECK = {"title": str, "dtype": str, "mean": float, "errors": dict}
GOAL = {
    "goal": str,
    "bound": float,
    "number": float | None,
    "where": str | None,
    "met": bool,
}


def assert_kinds(told, kinds):
    assert set(told) == set(kinds)
    for key, kind in kinds.items():
        assert isinstance(told[key], kind), key


def assert_provenance(about):
    assert_kinds(about, ABOUT)
    assert about["kind"] in ("cpu", "cuda")
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", about["commit"])
    assert datetime.datetime.fromisoformat(about["date"]).tzinfo


def assert_record(record):
    assert_provenance(record["provenance"])
    if "chapters" in record:
        assert_chapters(record)
    elif "runs" in record:
        assert_reproduced(record)
    elif "folding" in record:
        assert_folding(record)
    else:
        assert_speed(record)


FOLDING = {
    "title": str,
    "widths": list,
    "blocks": int,
    "shape": list,
    "dtype": str,
    "parameters": int,
    "batch_norms": int,
    "samples": int,
    "results": dict,
    "difference": dict,
}


def assert_folding(record):
    assert set(record) == {"provenance", "allocator", "folding"}
    assert record["folding"]
    for line in record["folding"]:
        assert_kinds(line, FOLDING)
        assert line["batch_norms"] > 0
        assert set(line["results"]) == {"torch", "normlib", "folded"}
        for result in line["results"].values():
            assert result["ms"] == sorted(result["ms"])
            assert result["ms"][0] > 0
            assert result["ratio"] > 0
        for dtype, tolerance in folding.TOLERANCE.items():
            name = speed.short(dtype)
            assert line["difference"][name] <= tolerance


def assert_chapters(record):
    assert set(record) == {"provenance", "chapters"}
    about = record["provenance"]
    assert record["chapters"]
    for ran in record["chapters"].values():
        assert set(ran) == {"seconds", "cells", "comparisons"}
        assert 0 <= ran["seconds"] < 600
        for comparison in ran["comparisons"]:
            assert_kinds(comparison, COMPARISON)
            assert comparison["difference"] <= comparison["tolerance"]
        devices = {c["device"] for c in ran["comparisons"]}
        if devices:
            assert about["kind"] in devices


def assert_speed(record):
    assert set(record) == {
        *("provenance", "allocator", "copy_gbs"),
        *("goals", "speed", "checks"),
    }
    assert record["copy_gbs"] >= 0
    if record["provenance"]["kind"] == "cpu":
        assert record["allocator"]["MALLOC_MMAP_MAX_"] == "0"
    for goal in record["goals"]:
        assert_kinds(goal, GOAL)
    for line in record["speed"]:
        assert_kinds(line, LINE)
        assert {"torch", "normlib", "eager"} <= set(line["results"])
        for result in line["results"].values():
            assert_kinds(result, RESULT)
            assert result["ms"] == sorted(result["ms"])
            assert result["ms"][0] > 0
        assert (line["memory"] is not None) == (line["pass"] == "both")
    timed = {(line["title"], line["dtype"]) for line in record["speed"]}
    for check in record["checks"]:
        assert_kinds(check, CHECK)
        assert {"torch", "normlib", "eager"} <= set(check["errors"])
    assert {(c["title"], c["dtype"]) for c in record["checks"]} == timed


SETTINGS = {
    "quick": bool,
    "data": dict,
    "dtype": str,
    "channels_last": bool,
    "scale": dict,
}
RUN = {
    "experiment": str,
    "variant": str,
    "seed": int,
    "settings": dict,
    "seconds": float,
    "layers": list,
    "diverged_at": int | None,
    "graph": bool,
    "loss": dict,
    "marks": list,
}
WALK = {"loss_low", "loss_high", "grad_change_low", "grad_change_high", "beta"}
SHIFT = {"distance", "cosine", "norm", "wasserstein", "mean_shift"}
DEEP = {"landscape", "shift"}
CLASSIFIER = {"step", "train_accuracy", "test_accuracy"}
READINGS = {
    "vgg": CLASSIFIER | DEEP,
    "deep-linear": {"step"} | DEEP,
    "learning-rates": CLASSIFIER,
    "batch-sizes": CLASSIFIER,
}


def assert_reproduced(record):
    assert set(record) == {"provenance", "settings", "runs"}
    assert_kinds(record["settings"], SETTINGS)
    assert set(record["settings"]["data"]) == {
        *("name", "train", "test", "crc32")
    }
    keys = set()
    for run in record["runs"]:
        assert_kinds(run, RUN)
        keys.add(json.dumps([run[key] for key in reproduce.Run._fields]))
        assert run["variant"] in reproduce.NORMS
        steps = run["settings"]["steps"]
        assert set(run["loss"]) == {"every", "mean"}
        stopped = steps if run["diverged_at"] is None else run["diverged_at"]
        every = run["loss"]["every"]
        assert (len(run["loss"]["mean"]) - 1) * every <= stopped
        if run["diverged_at"] is None:
            assert None not in run["loss"]["mean"]
            assert run["marks"][-1]["step"] == steps
        for row in run["marks"]:
            assert_readings(run, row)
    assert len(keys) == len(record["runs"])


def assert_readings(run, row):
    assert set(row) == READINGS[run["experiment"]]
    if "landscape" not in row:
        return
    walk, shift = row["landscape"], row["shift"]
    assert set(walk) == WALK
    if None not in walk.values():
        assert walk["loss_low"] <= walk["loss_high"]
        assert walk["grad_change_low"] <= walk["grad_change_high"]
    assert set(shift) == SHIFT
    assert {len(told) for told in shift.values()} == {len(run["layers"])}
    # Nothing lies in front of the first layer, and its input is the data.
    if shift["norm"][0] is not None:
        assert shift["distance"][0] <= 1e-3 * shift["norm"][0]
    assert shift["wasserstein"][0] == 0


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_committed_record_is_complete_and_from_a_clean_checkout(file):
    record = json.loads(file.read_text())
    assert_record(record)
    assert file.name == provenance.name_of(record["provenance"])
    assert not record["provenance"]["dirty"]
    assert record["provenance"]["commit"] != "unknown"
    if "runs" in record:
        assert not record["settings"]["quick"]
        assert record["settings"]["data"]["name"] == "CIFAR-10"


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A book of one chapter, whose cells a test writes."""

    def write(*sources):
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        notebook = nbformat.v4.new_notebook(cells=cells)
        nbformat.write(notebook, tmp_path / "01_one.ipynb")

    monkeypatch.setattr(chapters, "chapters", lambda: [*tmp_path.glob("*.i*")])
    monkeypatch.setattr(
        sys, "argv", ["chapters", "--device", "cpu", "--out", str(tmp_path)]
    )
    yield write
    chapters.testing.use_devices()
    chapters.testing.comparisons.clear()


AGREE = """\
from normlib.testing import agree, devices
import torch
for device in devices():
    x = torch.ones(3, device=device)
    agree("ones", x, x + 1e-7)
"""


def test_a_run_leaves_a_complete_record(book, tmp_path, capsys):
    book("a = 1", AGREE, "a + 1\nassert a == 1")
    chapters.main()
    (file,) = tmp_path.glob("chapters-cpu-*.json")
    record = json.loads(file.read_text())
    assert_record(record)
    ran = record["chapters"]["01_one"]
    assert [c["name"] for c in ran["comparisons"]] == ["ones"]
    assert 0 < ran["comparisons"][0]["difference"] < 2e-7
    assert "01_one" in capsys.readouterr().out


def test_a_cell_that_fails_is_named(book):
    book("a = 1", "b = 2\na / (b - 2)")
    with pytest.raises(
        SystemExit,
        match=r"01_one.ipynb, code cell 2 of 2 failed: ZeroDivisionError",
    ):
        chapters.main()


@pytest.mark.parametrize("command", [chapters, folding, reproduce, speed])
def test_no_command_goes_on_without_the_device_it_is_to_record(
    command, tmp_path, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    told = [command.__name__, "--device", "cuda", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", told)
    with pytest.raises(SystemExit, match="no CUDA device here"):
        command.main()
    assert not list(tmp_path.iterdir())


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path):
    about = {
        "command": "python -m benchmarks.speed",
        "kind": "cpu",
        "device": "A (R) CPU",
        "date": "2026-01-02T03:04:05",
    }
    file = provenance.record_in(tmp_path, {"provenance": about, "speed": []})
    assert file.name == "speed-cpu-a-r-cpu-2026-01-02.json"
    before = file.read_text("utf-8")
    with pytest.raises(UnicodeEncodeError):
        provenance.write(file, "new \ud800")
    assert file.read_text("utf-8") == before


def test_a_trial_of_the_speed_leaves_a_complete_record(
    tmp_path, monkeypatch, capsys
):
    for name, value in speed.PINNED.items():
        monkeypatch.setenv(name, value)
    told = ["speed", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", told)
    speed.main()
    (file,) = tmp_path.glob("speed-cpu-*.json")
    record = json.loads(file.read_text())
    assert_record(record)
    titles = {line["title"] for line in record["speed"]}
    assert titles == {row.title for row in speed.QUICK}
    shown = capsys.readouterr().out
    assert all(title in shown for title in titles)
    goals = speed.judge(record["speed"], record["checks"])
    assert record["goals"] == goals
    assert all(speed.verdict(goal) in shown for goal in goals)


def test_a_trial_of_folding_leaves_a_complete_record(
    tmp_path, monkeypatch, capsys
):
    for name, value in speed.PINNED.items():
        monkeypatch.setenv(name, value)
    told = ["folding", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", told)
    folding.main()
    (file,) = tmp_path.glob("folding-cpu-*.json")
    record = json.loads(file.read_text())
    assert_record(record)
    shown = capsys.readouterr().out
    assert all(line["title"] in shown for line in record["folding"])
    batches = [line["shape"][0] for line in record["folding"]]
    assert batches == list(folding.BATCHES)


def record_a_chapter(folder, date="2026-01-01", difference=0.01):
    record = {
        "provenance": {
            "date": date,
            "device": "NVIDIA X",
            "torch": "2.11.0",
            "commit": "0123456789",
        },
        "chapters": {
            "01_one": {
                "seconds": 12.3,
                "comparisons": [
                    {"device": "cpu", "difference": 1.0},
                    {"device": "cuda", "difference": difference},
                ],
            }
        },
    }
    name = f"chapters-cuda-nvidia-x-{date}.json"
    (folder / name).write_text(json.dumps(record))


def test_a_chapter_shows_its_latest_gpu_record(tmp_path):
    record_a_chapter(tmp_path, "2026-01-02", 0.02)
    record_a_chapter(tmp_path, "2026-01-01", 0.01)
    shown = gpu_record.page(tmp_path, "01_one")
    assert "NVIDIA X on 2026-01-02" in shown
    assert "made 1 of" in shown
    assert "2.0e-02" in shown


def test_a_chapter_without_a_gpu_record_says_how_to_make_one(tmp_path):
    record_a_chapter(tmp_path)
    shown = gpu_record.page(tmp_path, "02_two")
    assert "not yet recorded" in shown
    assert "python -m benchmarks.chapters --device cuda" in shown


def test_the_page_shows_the_latest_times_of_folding(tmp_path):
    assert "not yet recorded" in folding_record.page(tmp_path)
    for kind, date, ratio in [
        ("cpu", "2026-01-02", 1.5),
        ("cpu", "2026-01-01", 9.0),
        ("cuda", "2026-01-01", 1.25),
    ]:
        about = {
            "kind": kind,
            "device": f"a {kind}",
            "date": date,
            "torch": "2.13.0",
            "commit": "0123456789",
        }
        line = {
            "title": "a network",
            "shape": [32, 3, 8, 8],
            "batch_norms": 19,
            "results": {
                "torch": {"ms": [1.0, 3.0, 4.0], "ratio": 1.0},
                "folded": {"ms": [1.0, 2.0, 4.0], "ratio": ratio},
            },
        }
        record = {"provenance": about, "folding": [line]}
        name = f"folding-{kind}-x-{date}.json"
        (tmp_path / name).write_text(json.dumps(record))
    shown = folding_record.page(tmp_path)
    assert "| a network | 32 | 19 | 3.00 | 2.00 | 1.50 |" in shown
    assert "a cuda, 2026-01-01 (torch 2.13.0, commit 0123456)" in shown
    assert "9.00" not in shown
    assert shown.index("a cpu") < shown.index("a cuda")
