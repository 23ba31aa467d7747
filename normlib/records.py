"""What the benchmarks left, and a board to set beside it.

The commands of ``benchmarks`` write records, and the book shows the
:func:`newest` of each kind. Those of ``python -m benchmarks.reproduce`` are of
long runs on a GPU. A chapter reads the latest one, and shows on a
:class:`Scoreboard` what a paper reports, what the chapter itself measured and
what the record holds. Where there is no record it says so, and no number.
"""

import json
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import NamedTuple

MISSING = "not yet recorded"
FOLDER = pathlib.PurePath("benchmarks", "records")


class Record(NamedTuple):
    """A record of the full-size experiments."""

    provenance: dict
    """Device, versions, commit and date."""
    runs: list[dict]
    """Each with its experiment, variant, seed and settings, and what it
    found: see benchmarks/README.md."""

    def readings(
        self, experiment: str, variant: str, reading: Callable[[dict], float]
    ) -> list[float]:
        """One number of each run that did not diverge.

        Args:
            experiment: such as ``"vgg"``.
            variant: such as ``"batch norm"``.
            reading: of a run, such as :func:`final_accuracy`.

        Returns:
            The numbers, in the order of the runs.
        """
        return [
            reading(run)
            for run in self.runs
            if (run["experiment"], run["variant"]) == (experiment, variant)
            and run["diverged_at"] is None
        ]


def latest(
    folder: str | pathlib.Path | None = None, kind: str = "cuda"
) -> Record | None:
    """The newest record of the full-size experiments, or None.

    Args:
        folder: where the records are; by default ``benchmarks/records`` of
            the checkout around the working directory.
        kind: ``"cuda"`` or ``"cpu"``.

    Returns:
        The record. None where there is no folder or nothing in it.
    """
    found = newest(f"reproduce-{kind}-*.json", folder)
    return found and Record(found["provenance"], found["runs"])


def latest_speed(
    folder: str | pathlib.Path | None = None, kind: str = "cpu"
) -> dict | None:
    """The newest record of ``python -m benchmarks.speed``, or None.

    Args:
        folder: as in :func:`latest`.
        kind: ``"cuda"`` or ``"cpu"``.

    Returns:
        The record as it was written: see benchmarks/README.md.
    """
    return newest(f"speed-{kind}-*.json", folder)


def newest(
    pattern: str,
    folder: str | pathlib.Path | None = None,
    holds: Callable[[dict], bool] | None = None,
) -> dict | None:
    """The newest record of a kind, by the date that it says, or None.

    Args:
        pattern: of the files' names, such as ``"chapters-cuda-*.json"``.
        folder: as in :func:`latest`.
        holds: says of a record whether it counts; by default each does.

    Returns:
        The record as it was written: see benchmarks/README.md.
    """
    here = pathlib.Path.cwd()
    folders = [here / FOLDER, *(parent / FOLDER for parent in here.parents)]
    chosen = [pathlib.Path(folder)] if folder is not None else folders
    files = [f for place in chosen for f in sorted(place.glob(pattern))]
    found = filter(holds, (json.loads(f.read_text("utf-8")) for f in files))
    return max(found, key=lambda r: r["provenance"]["date"], default=None)


def origin(provenance: dict) -> dict[str, str]:
    """What a page says of where a record is from.

    Args:
        provenance: the record's.

    Returns:
        Device, date, torch's version and the start of the commit.
    """
    return {
        "device": provenance["device"],
        "date": provenance["date"][:10],
        "torch": provenance["torch"],
        "commit": provenance["commit"][:7],
    }


def final_accuracy(run: dict) -> float:
    """The share of test images right at the end."""
    return run["marks"][-1]["test_accuracy"]


def final_loss(run: dict) -> float:
    """The mean training loss of the last stretch."""
    return run["loss"]["mean"][-1]


def loss_range(run: dict) -> float:
    """How far the loss went along a walk, the median over the training."""
    rows = [mark["landscape"] for mark in run["marks"]]
    return _median(
        row["loss_high"] - row["loss_low"]
        for row in rows
        if None not in (row["loss_high"], row["loss_low"])
    )


def gradient_change(run: dict) -> float:
    """How far the gradient went along a walk, the median over training."""
    return _median(
        mark["landscape"]["grad_change_high"] for mark in run["marks"]
    )


def largest_beta(run: dict) -> float:
    """The effective beta, the largest over the training."""
    found = [mark["landscape"]["beta"] for mark in run["marks"]]
    return max((b for b in found if b is not None), default=math.nan)


def cosine(run: dict) -> float:
    """Of G and G', the median over the layers but the first, and training."""
    return _median(
        value for mark in run["marks"] for value in mark["shift"]["cosine"][1:]
    )


def _median(values: Iterable[float | None]) -> float:
    kept = [value for value in values if value is not None]
    return statistics.median(kept) if kept else math.nan


def between(values: Sequence[float], digits: int = 2) -> str:
    """Lowest and highest, to some significant digits, as text.

    Of no values it says that there is no record.
    """
    if not len(values):
        return MISSING
    low, high = (
        f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0e}"
        for value in (min(values), max(values))
    )
    return low if low == high else f"{low} to {high}"


class Scoreboard:
    """A table: what a paper reports, what we measured, what is recorded.

    Show it by naming it at the end of a cell.

    Args:
        rows: five texts each: the question, the paper's number, the
            chapter's, the verdict on these two, and the record's.
        record: the record, whose device and date stand below the table.

    Raises:
        ValueError: a row of another length.
    """

    HEADER = ("", "paper", "here, CPU", "verdict", "record, GPU")

    def __init__(
        self, rows: Sequence[Sequence[str]], record: Record | None = None
    ):
        for row in rows:
            if len(row) != len(self.HEADER):
                raise ValueError(
                    f"a row has {len(self.HEADER)} texts, got {len(row)}: "
                    f"{tuple(row)}"
                )
        self.rows, self.record = [tuple(row) for row in rows], record

    def __repr__(self) -> str:
        verdicts = ", ".join(sorted({row[3] for row in self.rows}))
        return f"Scoreboard({len(self.rows)} rows: {verdicts})"

    def _source(self) -> str:
        if self.record is None:
            return (
                f"The full-size experiments are {MISSING}: "
                "<code>python -m benchmarks.reproduce --data DIR --device "
                "cuda</code> makes the record."
            )
        return escape(
            "The record is from {device}, {date}, torch {torch}, commit "
            "{commit}.".format(**origin(self.record.provenance))
        )

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col">{text}</th>' for text in self.HEADER)
        body = "".join(
            f'<tr><th scope="row">{escape(row[0])}</th>'
            + "".join(f"<td>{escape(text)}</td>" for text in row[1:])
            + "</tr>"
            for row in self.rows
        )
        return (
            f'<div class="normlib-board"><style>{_STYLE}</style>'
            '<table class="table normlib-scoreboard"><thead><tr>'
            f"{head}</tr></thead><tbody>{body}</tbody></table>"
            f"<p>{self._source()}</p></div>"
        )


_STYLE = """
.normlib-board{overflow-x:auto}
.normlib-board td,.normlib-board th{vertical-align:top}
html[data-theme=dark] .bd-content div.cell_output
.text_html:has(.normlib-board){background:none!important;padding:0}
html[data-theme=dark] .bd-content .normlib-board{
color:var(--pst-color-text-base)}
"""
