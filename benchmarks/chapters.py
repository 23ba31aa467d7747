"""Run the chapters as plain Python and record their comparisons.

``python -m benchmarks.chapters --device cuda`` from the root of a checkout
needs torch, numpy, matplotlib and scikit-learn: no Jupyter, and the package
need not be installed. Every code cell of every chapter runs in order; each
comparison with PyTorch is recorded with its device and largest difference.
"""

import argparse
import contextlib
import datetime
import io
import json
import linecache
import os
import pathlib
import platform
import re
import subprocess
import sys
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "records"
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

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


def said_by(*command):
    """Return what a command prints, or None where it fails."""
    try:
        run = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def processor():
    """Return the name of the processor."""
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/cpuinfo").read_text()
        if found := re.search(r"model name\s*: (.+)", text):
            return found[1]
    return platform.processor() or platform.machine()


def driver():
    """Return the version of the CUDA driver, or None."""
    asked = "--query-gpu=driver_version"
    found = said_by("nvidia-smi", asked, "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def source(commit=None):
    """Return the commit that runs, and whether the checkout differs from it.

    Args:
        commit: vouched for by the caller, where the files came without git.
    """
    changed = said_by("git", "status", "--porcelain")
    if changed is not None:
        return said_by("git", "rev-parse", "HEAD") or "unknown", bool(changed)
    return commit or "unknown", commit is None


def provenance(device, commit=None):
    """Return where, when and from what the record was made."""
    commit, dirty = source(commit)
    cuda = device == "cuda"
    now = datetime.datetime.now(datetime.UTC)
    return {
        "kind": device,
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "driver": driver() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "commit": commit,
        "dirty": dirty,
        "date": now.isoformat(timespec="seconds"),
        "command": f"python -m benchmarks.chapters --device {device}",
    }


def name_of(about):
    """Return the file's name: kind, device and date."""
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    return f"chapters-{about['kind']}-{device}-{about['date'][:10]}.json"


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
    """Run all chapters, write the record and show it."""
    parser = argparse.ArgumentParser(description=__doc__)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=best)
    parser.add_argument("--out", type=pathlib.Path, default=RECORDS)
    parser.add_argument("--echo", action="store_true", help="show prints")
    parser.add_argument("--commit", help="where the files have no git")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("normlib: no CUDA device here")
    # On a GPU the comparisons run on both, so that the record has both.
    testing.use_devices(*dict.fromkeys(("cpu", options.device)))
    about = provenance(options.device, options.commit)
    record = {"provenance": about, "chapters": {}}
    for path in chapters():
        print(f"normlib: running {path.name}", flush=True)
        try:
            record["chapters"][path.stem] = run(path, options.echo)
        except ChapterError as error:
            sys.exit(f"normlib: {error}")
    options.out.mkdir(parents=True, exist_ok=True)
    written = options.out / name_of(about)
    written.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(table(record))
    print(f"normlib: recorded in {written}")


if __name__ == "__main__":
    main()
