"""Run the chapters as plain Python and record their comparisons.

``python -m benchmarks.chapters --device cuda`` from the root of a checkout
needs torch, numpy, matplotlib and scikit-learn: no Jupyter, and the package
need not be installed. Every code cell of every chapter runs in order; each
comparison with PyTorch is recorded with its device and largest difference.
"""

import contextlib
import io
import linecache
import os
import pathlib
import sys
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from benchmarks.provenance import (  # noqa: E402
    asked,
    options,
    provenance,
    record_in,
)
from normlib import testing  # noqa: E402
from tools.book import code_cells  # noqa: E402


class ChapterError(Exception):
    """A cell that failed: which notebook, which cell, which exception."""


def chapters(folder=ROOT / "chapters"):
    """Return the paths of the chapters, in their order."""
    return sorted(folder.glob("*.ipynb"))


def run_cell(source, name, namespace):
    """Run one cell; tracebacks and inspect can show its lines."""
    lines = source.splitlines(keepends=True)
    linecache.cache[name] = (len(source), None, lines, name)
    exec(compile(source, name, "exec"), namespace)


def run(path, echo=False):
    """Run a chapter's cells in one namespace.

    Args:
        path: the notebook.
        echo: whether what the cells print is shown.

    Returns:
        The seconds it took and the comparisons it made.

    Raises:
        ChapterError: where a cell raises.
    """
    namespace = {"__name__": "__main__"}
    said = sys.stdout if echo else io.StringIO()
    sources = code_cells(path)
    testing.comparisons.clear()
    start, before = time.perf_counter(), os.getcwd()
    os.chdir(path.parent)
    try:
        for number, source in enumerate(sources, start=1):
            name = f"{path.name}, code cell {number} of {len(sources)}"
            try:
                with contextlib.redirect_stdout(said):
                    run_cell(source, name, namespace)
            except Exception as error:
                traceback.print_exc()
                reason = f"{type(error).__name__}: {error}"
                raise ChapterError(f"{name} failed: {reason}") from error
    finally:
        os.chdir(before)
        plt.close("all")
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "cells": len(sources),
        "comparisons": [c._asdict() for c in testing.comparisons],
    }


def table(record):
    """Return the record as text, a line for each chapter and device."""
    lines = [f"{'chapter':32} {'device':6} comparisons  largest  seconds"]
    for name, ran in record["chapters"].items():
        for device in testing.devices():
            found = [
                c["difference"]
                for c in ran["comparisons"]
                if c["device"] == device
            ]
            largest = max(found, default=0)
            lines.append(
                f"{name:32} {device:6} {len(found):11d}  {largest:7.1e}  "
                f"{ran['seconds']:7.1f}"
            )
    return "\n".join(lines)


def main():
    """Run all chapters; where none fails, write the record and show it."""
    parser = options(__doc__)
    parser.add_argument("--echo", action="store_true", help="show prints")
    told = asked(parser)
    # On a GPU the comparisons run on both, so that the record has both.
    testing.use_devices(*dict.fromkeys(("cpu", told.device)))
    about = provenance("benchmarks.chapters", told.device, told.commit)
    record = {"provenance": about, "chapters": {}}
    failed = []
    for path in chapters():
        print(f"normlib: running {path.name}", flush=True)
        try:
            record["chapters"][path.stem] = run(path, told.echo)
        except ChapterError as error:
            failed.append(f"normlib: {error}")
    if failed:
        sys.exit("\n".join(failed))
    written = record_in(told.out, record)
    print(table(record))
    print(f"normlib: recorded in {written}")


if __name__ == "__main__":
    main()
