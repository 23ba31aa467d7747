"""What the commands share: options, where a record is from, its file."""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import platform
import re
import subprocess
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "records"


def options(about, out=RECORDS):
    """Return a parser with the options of all commands.

    Args:
        about: what the command is for.
        out: the folder of its records, where none is named.
    """
    parser = argparse.ArgumentParser(description=about)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=best)
    parser.add_argument("--out", type=pathlib.Path, default=out)
    parser.add_argument("--commit", help="where the files have no git")
    return parser


def asked(parser):
    """Return what the command line asks for; end without such a device."""
    told = parser.parse_args()
    if told.device == "cuda" and not torch.cuda.is_available():
        sys.exit("normlib: no CUDA device here")
    return told


def provenance(command, device, commit=None):
    """Return where, when and from what the record was made.

    Args:
        command: the module that ran, such as ``benchmarks.chapters``.
        device: ``cpu`` or ``cuda``.
        commit: vouched for by the caller, where the files came without git.
    """
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
        "command": f"python -m {command} --device {device}",
    }


def name_of(about):
    """Return the file's name: what ran, kind, device and date."""
    what = re.search(r"benchmarks\.(\w+)", about["command"])[1]
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    return f"{what}-{about['kind']}-{device}-{about['date'][:10]}.json"


def record_in(folder, record):
    """Write a record under its name, and return the file."""
    path = folder / name_of(record["provenance"])
    write(path, json.dumps(record, indent=1) + "\n")
    return path


def write(path, text):
    """Write a file, and its folder, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(text, "utf-8")
    os.replace(draft, path)


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
