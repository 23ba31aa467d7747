"""The records of the benchmarks: each one complete, and made as they say."""

import json
import pathlib
import sys

import folding_record
import gpu_record
import nbformat
import pytest
from recorded import assert_record

from benchmarks import chapters, folding, provenance, reproduce, speed

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "benchmarks" / "records").glob("*.json"))


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
def recorded(tmp_path, monkeypatch):
    """Run a command on the CPU; return its record, which is complete."""
    for name, value in speed.PINNED.items():
        monkeypatch.setenv(name, value)

    def run(command, *options):
        name = command.__name__.removeprefix("benchmarks.")
        told = [name, "--device", "cpu", "--out", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", told)
        command.main()
        (file,) = tmp_path.glob(f"{name}-cpu-*.json")
        record = json.loads(file.read_text())
        assert_record(record)
        return record

    return run


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A book whose chapters, mostly one, a test writes."""

    def write(*sources, name="01_one"):
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        notebook = nbformat.v4.new_notebook(cells=cells)
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")

    monkeypatch.setattr(chapters, "chapters", lambda: [*tmp_path.glob("*.i*")])
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


def test_a_run_leaves_a_complete_record(book, recorded, capsys):
    book("a = 1", AGREE, "a + 1\nassert a == 1")
    ran = recorded(chapters)["chapters"]["01_one"]
    assert [c["name"] for c in ran["comparisons"]] == ["ones"]
    assert 0 < ran["comparisons"][0]["difference"] < 2e-7
    assert "01_one" in capsys.readouterr().out


def test_every_cell_that_fails_is_named(book, recorded, tmp_path):
    book("a = 1", "b = 2\na / (b - 2)")
    book("a = 1", name="02_two")
    book("assert 0, 'not so'", "a = 1", name="03_three")
    with pytest.raises(SystemExit) as end:
        recorded(chapters)
    one, three = sorted(str(end.value).splitlines())
    assert "01_one.ipynb, code cell 2 of 2 failed: ZeroDivisionError" in one
    assert "03_three.ipynb, code cell 1 of 2 failed: Assert" in three
    assert not list(tmp_path.glob("**/*.json"))


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


def test_a_trial_of_the_speed_leaves_a_complete_record(recorded, capsys):
    record = recorded(speed, "--quick")
    titles = {line["title"] for line in record["speed"]}
    assert titles == {row.title for row in speed.QUICK}
    shown = capsys.readouterr().out
    assert all(title in shown for title in titles)
    goals = speed.judge(record["speed"], record["checks"])
    assert record["goals"] == goals
    assert all(speed.verdict(goal) in shown for goal in goals)


def test_a_trial_of_folding_leaves_a_complete_record(recorded, capsys):
    record = recorded(folding, "--quick")
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
