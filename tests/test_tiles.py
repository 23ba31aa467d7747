"""The search for tiles: what it tries, and what it leaves out."""

import json
import os
import sys

import pytest
import torch
from recorded import assert_record

from benchmarks import speed, tiles
from normlib import backends
from normlib.backends import triton

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
by_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="test_triton.py runs this file by the interpreter"
)

ROW = speed.Row("RMSNorm", (4, 24), "rows")


@pytest.fixture
def call():
    x, dy = speed.data(ROW, torch.float32, "cpu")
    return speed.Call(ROW, tiles.normlib, x, dy, "triton")


@pytest.mark.parametrize("name", tiles.ALTERNATIVES)
def test_each_constant_is_one_of_the_backend_and_gets_another_value(name):
    values = tiles.ALTERNATIVES[name]
    assert getattr(triton, name) not in values
    assert all(value & (value - 1) == 0 for value in values)


@by_interpreter
def test_only_what_changes_a_launch_is_tried(call):
    found = tiles.different(call.both)
    assert found["as it is"] == {}
    assert found["STAGES=1"] == {"STAGES": 1}
    assert not {"SPLITS", "LONG_BLOCK"} & {t.split("=")[0] for t in found}
    assert "STAGES=1" not in tiles.different(call.forward)  # has no loop


def test_the_constants_come_back_also_after_an_error():
    constants = {"STAGES": 7, "FEW": 1}
    before = {name: getattr(triton, name) for name in constants}
    seen = {}

    def fail():
        with tiles.chosen(constants):
            seen.update({name: getattr(triton, name) for name in constants})
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == constants
    assert {name: getattr(triton, name) for name in constants} == before


@by_interpreter
def test_what_a_gpu_cannot_launch_is_told_and_left_out(monkeypatch):
    from triton.runtime.errors import OutOfResources

    usual = triton._launch

    def launch(kernel, grid, *args, **constants):
        if "ROWS" in constants and constants["num_warps"] > 1:
            raise OutOfResources(300_000, 232_448, "shared memory")
        usual(kernel, grid, *args, **constants)

    monkeypatch.setattr(triton, "_launch", launch)
    monkeypatch.setattr(tiles, "ALTERNATIVES", {"EACH": (1, 8)})
    forward, both = tiles.measure(ROW, torch.float32, "cpu", 0.0)
    for line in (forward, both):
        assert "shared memory" in line["failed"]["EACH=1"]
        assert "as it is" in line["results"]
    found = tiles.summary([both])
    assert "EACH=1" not in found


def test_other_numbers_end_the_search():
    exact = (torch.tensor([1.0, 2.0]),)
    tiles.check("STAGES=1", exact[0] + 1e-7, exact, torch.float32)
    for wrong in (exact[0] + 1e-3, exact[0] * torch.nan):
        with pytest.raises(SystemExit, match=r"STAGES=1 gives other numbers"):
            tiles.check("STAGES=1", wrong, exact, torch.float32)


def test_the_gain_is_a_geometric_mean_over_the_lines():
    lines = [
        {"results": {"as it is": {"gain": 1.0}, "FEW=1": {"gain": gain}}}
        for gain in (0.5, 2.0)
    ]
    found = tiles.summary(lines)
    assert found == {"FEW=1": {"lines": 2, "mean": 1.0, "worst": 0.5}}


@by_interpreter
def test_a_search_leaves_a_complete_record(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "ready", lambda *about: None)
    argv = ["tiles", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    tiles.main()
    (path,) = tmp_path.glob("tiles-cpu-*.json")
    record = json.loads(path.read_text("utf-8"))
    assert_record(record)
    assert {line["title"] for line in record["tiles"]} == {
        row.title for row in tiles.QUICK
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--only", "Nothing"], "Nothing"), ([], "Triton's interpreter")],
)
def test_a_search_without_a_way_to_run_says_so(options, said, monkeypatch):
    monkeypatch.setattr(speed, "ready", lambda *about: None)
    names = ["triton", "eager"] if options else ["eager"]
    monkeypatch.setattr(backends, "available", lambda: names)
    monkeypatch.setattr(sys, "argv", ["tiles", "--device", "cpu", *options])
    with pytest.raises(SystemExit, match=said):
        tiles.main()
