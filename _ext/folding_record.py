"""``{folding-record}``: what folding saved, by the latest record of each kind.

Shows the times of ``python -m benchmarks.folding`` as a table, with the
device, the date and the commit that they come from.
"""

from record import KINDS, RecordDirective

from normlib.records import newest, origin

NONE = """\
*The time that this saves:* not yet recorded. `python -m benchmarks.folding` \
measures it."""
HEAD = """\
*The time that this saves:* one forward pass with PyTorch's batch norm and \
folded, medians in milliseconds, {device}, {date} (torch {torch}, commit \
{commit}).

| network | batch | batch norms | unfolded | folded | times as fast |
|---|---|---|---|---|---|
"""
ROW = "| {title} | {batch} | {norms} | {torch:.2f} | {folded:.2f} | {by:.2f} |"


def table(record):
    """Return a record as MyST: where it is from, and a row for each line."""
    head = HEAD.format(**origin(record["provenance"]))
    rows = [
        ROW.format(
            title=line["title"],
            batch=line["shape"][0],
            norms=line["batch_norms"],
            torch=line["results"]["torch"]["ms"][1],
            folded=line["results"]["folded"]["ms"][1],
            by=line["results"]["folded"]["ratio"],
        )
        for line in record["folding"]
    ]
    return head + "\n".join(rows)


def page(folder):
    """Return what the folder's records say, as MyST."""
    found = (newest(f"folding-{kind}-*.json", folder) for kind in KINDS)
    return "\n\n".join(map(table, filter(None, found))) or NONE


class FoldingRecord(RecordDirective):
    """Show what folding saved."""

    page = staticmethod(page)


def setup(app):
    """Register the directive."""
    app.add_directive("folding-record", FoldingRecord)
    return {"version": "1", "parallel_read_safe": True}
