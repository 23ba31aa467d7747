"""What a record of each benchmark holds.

Imports what the benchmarks need and no more, so that the tests on a machine
with a GPU, which has no Jupyter Book, can use it.
"""

import datetime
import json
import re

from benchmarks import folding, reproduce, speed

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
    elif "tiles" in record:
        assert_tiles(record)
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


TILES = {
    "title": str,
    "dtype": str,
    "pass": str,
    "samples": int,
    "failed": dict,
    "results": dict,
}


def assert_tiles(record):
    assert set(record) == {"provenance", "tiles", "summary"}
    assert record["tiles"]
    for line in record["tiles"]:
        assert_kinds(line, TILES)
        assert line["results"]["as it is"]["gain"] == 1
        assert not set(line["results"]) & set(line["failed"])
        for result in line["results"].values():
            assert result["ms"] > 0
            assert result["gain"] > 0
    for found in record["summary"].values():
        assert set(found) == {"lines", "mean", "worst"}
        assert found["worst"] <= found["mean"]


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
    # "missing" where the run was broken off, "tests" where they were run.
    assert set(record) - {"missing", "tests"} == {
        *("provenance", "allocator", "copy_gbs"),
        *("goals", "speed", "checks"),
    }
    on_gpu = record["provenance"]["kind"] == "cuda"
    kinds = RESULT | ({"wall": float} if on_gpu else {})
    assert record["copy_gbs"] >= 0
    if record["provenance"]["kind"] == "cpu":
        assert record["allocator"]["MALLOC_MMAP_MAX_"] == "0"
    for goal in record["goals"]:
        assert_kinds(goal, GOAL)
    for line in record["speed"]:
        assert_kinds(line, LINE)
        assert {"torch", "normlib", "eager"} <= set(line["results"])
        for result in line["results"].values():
            assert_kinds(result, kinds)
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
