"""What a chapter reads of the full-size experiments' records, and shows."""

import json
import math

import pytest

from normlib import records
from normlib.records import Scoreboard, between


def run(variant="batch norm", seed=0, **changes):
    walk = {"loss_low": 1.0, "loss_high": 3.0, "grad_change_low": 0.1}
    marks = [
        {
            "test_accuracy": 0.1 + 0.3 * i,
            "landscape": walk | {"grad_change_high": 2.0 + i, "beta": 5.0 - i},
            "shift": {"cosine": [None, 0.5, 0.7 + 0.1 * i]},
        }
        for i in range(3)
    ]
    found = {
        "experiment": "vgg",
        "variant": variant,
        "seed": seed,
        "diverged_at": None,
        "loss": {"every": 10, "mean": [2.0, 0.25]},
        "marks": marks,
    }
    return found | changes


def write(folder, date, *runs, kind="cuda"):
    about = {
        "device": "<GPU>",
        "date": date,
        "torch": "2",
        "commit": "abcdef0",
    }
    text = json.dumps({"provenance": about, "runs": runs})
    (folder / f"reproduce-{kind}-{date[:10]}.json").write_text(text)


def test_without_a_record_there_is_none(tmp_path):
    assert records.latest(tmp_path) is None
    assert records.latest(tmp_path / "missing") is None
    assert between([]) == "not yet recorded"


def test_the_newest_record_of_a_kind_is_read(tmp_path):
    write(tmp_path, "2026-01-02T00", run(seed=1))
    write(tmp_path, "2026-03-01T00", run(seed=2))
    write(tmp_path, "2026-04-01T00", run(seed=3), kind="cpu")
    assert records.latest(tmp_path).runs[0]["seed"] == 2
    assert records.latest(tmp_path, "cpu").runs[0]["seed"] == 3


def test_the_newest_is_that_of_the_records_that_hold_something(tmp_path):
    write(tmp_path, "2026-01-02T00", run(seed=1))
    write(tmp_path, "2026-03-01T00", run(seed=2))
    found = records.newest(
        "reproduce-*.json", tmp_path, lambda r: r["runs"][0]["seed"] < 2
    )
    assert records.origin(found["provenance"])["date"] == "2026-01-02"


def test_it_is_found_from_a_folder_of_the_checkout(tmp_path, monkeypatch):
    (tmp_path / "benchmarks" / "records").mkdir(parents=True)
    (tmp_path / "chapters").mkdir()
    write(tmp_path / "benchmarks" / "records", "2026-01-02T00", run())
    for place in (tmp_path, tmp_path / "chapters"):
        monkeypatch.chdir(place)
        assert len(records.latest().runs) == 1


@pytest.mark.parametrize(
    ("reading", "value"),
    [
        (records.final_accuracy, 0.7),
        (records.final_loss, 0.25),
        (records.loss_range, 2.0),
        (records.gradient_change, 3.0),
        (records.largest_beta, 5.0),
        (records.cosine, 0.6),
    ],
)
def test_a_reading_of_a_run(reading, value):
    assert reading(run()) == pytest.approx(value)


@pytest.mark.parametrize(
    "reading",
    [
        records.loss_range,
        records.gradient_change,
        records.largest_beta,
        records.cosine,
    ],
)
def test_what_is_not_finite_is_left_out(reading):
    found = run()
    lost = dict.fromkeys(("loss_low", "loss_high", "grad_change_high", "beta"))
    for mark in found["marks"]:
        mark["landscape"] = lost
        mark["shift"] = {"cosine": [None, None]}
    assert math.isnan(reading(found))


def test_readings_are_of_one_variant_and_leave_out_what_diverged(tmp_path):
    runs = [run(), run(variant="none"), run(diverged_at=7, marks=[])]
    write(tmp_path, "2026-01-02T00", *runs)
    record = records.latest(tmp_path)
    found = record.readings("vgg", "batch norm", records.final_loss)
    assert found == [0.25]
    assert record.readings("vgg", "L1", records.final_loss) == []


def test_a_range_as_text():
    assert between([0.512, 0.498, 0.7], 2) == "0.5 to 0.7"
    assert between([0.501, 0.502], 2) == "0.5"
    assert between([12345.0, 3.0], 2) == "3 to 1e+04"


def test_the_board_shows_its_rows_and_where_the_record_is_from(tmp_path):
    rows = [("a < b?", "1", "2", "reproduced", between([]))]
    board = Scoreboard(rows)
    page = board._repr_html_()
    assert "a &lt; b?" in page
    assert page.count("not yet recorded") == 2
    assert page.count("<td>") == 4
    assert repr(board) == "Scoreboard(1 rows: reproduced)"
    write(tmp_path, "2026-01-02T00", run())
    page = Scoreboard(rows, records.latest(tmp_path))._repr_html_()
    assert "&lt;GPU&gt;, 2026-01-02, torch 2, commit abcdef0" in page


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="5 texts, got 2"):
        Scoreboard([("a", "b")])
