"""``{speed-record}``: what is fastest for which layer, by the latest records.

A table for each kind of device from the records of ``python -m
benchmarks.speed``: float32, forward and backward, one line a layer and shape,
with the device, the date and the commit that the times come from.
"""

from record import KINDS, RecordDirective

from normlib.records import latest_speed, origin

NAMES = {
    "torch": "torch.nn",
    "compiled": "torch.compile",
    "liger": "Liger-Kernel",
}
NONE = """\
*On {kind}:* not yet recorded. `python -m benchmarks.speed --device {name}` \
measures it."""
HEAD = """\
*On {kind}:* {device}, {date} (torch {torch}, {threads} threads, commit \
{commit}). Forward and backward in float32, medians in milliseconds; the \
formula is the plain one, operation by operation; *times torch.nn* says how \
many times as fast as torch.nn normlib is. A plain copy moves \
{copy:.0f} GB/s there.

| layer and shape | fastest | times torch.nn | normlib | torch.nn | formula |
|---|---|---|---|---|---|
"""
ROW = "| {title} | {best} | {ratio:.2f} | {ours:.2f} | {torch:.2f} | {eager} |"
CLOSE = 1.05
"""What is not faster by more than this is called equal."""


def fastest(results):
    """Name what to use; where nothing is clearly faster, say so."""
    given = {
        "torch": 1.0,
        "normlib": results["normlib"]["ratio"],
        **{
            name: results[name]["ratio"]
            for name in ("compiled", "liger")
            if name in results
        },
    }
    best = max(given, key=given.get)
    others = [ratio for name, ratio in given.items() if name != best]
    if given[best] <= CLOSE * max(others):
        return "no difference"
    return f"**{NAMES.get(best, best)}**"


def table(record):
    """Return a record as MyST: where it is from, and a row for each line."""
    about = record["provenance"]
    head = HEAD.format(
        kind=KINDS[about["kind"]],
        threads=about["threads"],
        copy=record["copy_gbs"],
        **origin(about),
    )
    rows = []
    for line in record["speed"]:
        if (line["pass"], line["dtype"]) != ("both", "float32"):
            continue
        told = line["results"]
        eager = told.get("eager")
        rows.append(
            ROW.format(
                title=title(line),
                eager=f"{eager['ms'][1]:.2f}" if eager else "",
                torch=told["torch"]["ms"][1],
                ours=told["normlib"]["ms"][1],
                ratio=told["normlib"]["ratio"],
                best=fastest(told),
            )
        )
    return head + "\n".join(rows)


def title(line):
    """The layer and its shape as a reader would write them."""
    told = f"{line['layer']} {'×'.join(map(str, line['shape']))}"
    options = line["options"]
    words = []
    if "num_groups" in options:
        words.append(f"{options['num_groups']} groups")
    if options.get("affine"):
        words.append("affine")
    if options.get("elementwise_affine") is False:
        words.append("no affine")
    words += ["channels last"] * line["channels_last"]
    words += ["evaluation"] * (not line["training"])
    return f"{told} ({', '.join(words)})" if words else told


def page(folder):
    """Return what the folder's records say, as MyST."""
    parts = []
    for name, kind in KINDS.items():
        record = latest_speed(folder, name)
        parts.append(
            NONE.format(kind=kind, name=name)
            if record is None
            else table(record)
        )
    return "\n\n".join(parts)


class SpeedRecord(RecordDirective):
    """Show which kernel is fastest for which layer."""

    page = staticmethod(page)


def setup(app):
    """Register the directive."""
    app.add_directive("speed-record", SpeedRecord)
    return {"version": "1", "parallel_read_safe": True}
