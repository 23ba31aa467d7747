"""The table of chapter 10: what is fastest, by the records."""

import json
import pathlib

import pytest
import speed_record

from normlib import records

ROOT = pathlib.Path(__file__).parents[1]


def record(kind="cpu", date="2026-01-01", **ratios):
    results = {
        name: {"ms": [1.0, 6.0 / ratio, 7.0], "ratio": ratio}
        for name, ratio in {"torch": 1.0, **ratios}.items()
    }
    line = {
        "layer": "GroupNorm",
        "shape": [2, 6, 5, 5],
        "options": {"num_groups": 3},
        "channels_last": True,
        "training": True,
        "dtype": "float32",
        "pass": "both",
        "results": results,
    }
    about = {
        "kind": kind,
        "device": f"the {kind}",
        "date": date,
        "torch": "2.13.0",
        "threads": 2,
        "commit": "0123456789",
    }
    others = [{**line, "pass": "forward"}, {**line, "dtype": "bfloat16"}]
    return {
        "provenance": about,
        "copy_gbs": 21.9,
        "speed": [line, *others],
    }


def write(folder, record):
    about = record["provenance"]
    name = f"speed-{about['kind']}-x-{about['date']}.json"
    (folder / name).write_text(json.dumps(record))


def test_it_shows_the_newest_record_of_each_kind(tmp_path):
    write(tmp_path, record(normlib=2.0, eager=0.5))
    write(tmp_path, record(date="2025-01-01", normlib=9.0))
    shown = speed_record.page(tmp_path)
    assert "the cpu, 2026-01-01 (torch 2.13.0, 2 threads, commit 0123456" in (
        shown
    )
    title = "GroupNorm 2×6×5×5 (3 groups, channels last)"
    assert f"| {title} | **normlib** | 2.00 | 3.00 | 6.00 | 12.00 |" in shown
    assert shown.count("GroupNorm") == 1
    assert "9.00" not in shown
    assert "On a GPU:* not yet recorded" in shown
    assert "python -m benchmarks.speed --device cuda" in shown


@pytest.mark.parametrize(
    ("ratios", "best"),
    [
        ({"normlib": 1.04}, "no difference"),
        ({"normlib": 0.97}, "no difference"),
        ({"normlib": 0.9}, "**torch.nn**"),
        ({"normlib": 1.5, "compiled": 2.0}, "**torch.compile**"),
        ({"normlib": 1.5, "compiled": 1.49}, "no difference"),
        ({"normlib": 1.5, "liger": 1.6}, "**Liger-Kernel**"),
        ({"normlib": 1.5, "cpu": 9.0}, "**normlib**"),
    ],
)
def test_faster_means_by_more_than_the_noise(ratios, best):
    results = record(**ratios)["speed"][0]["results"]
    assert speed_record.fastest(results) == best


def test_the_chapter_reads_the_same_record(tmp_path):
    assert records.latest_speed(tmp_path) is None
    for date in ("2026-01-01", "2025-01-01"):
        write(tmp_path, record(date=date, normlib=2.0))
    found = records.latest_speed(tmp_path)
    assert found["provenance"]["date"] == "2026-01-01"
    assert records.latest_speed(tmp_path, "cuda") is None


def test_the_records_of_the_project_can_be_shown():
    shown = speed_record.page(ROOT / "benchmarks" / "records")
    assert "| RMSNorm 8192×1024 |" in shown
