"""``{folding-record}``: what folding saved, by the latest record of each kind.

Shows the times of ``python -m benchmarks.folding`` as a table, with the
device, the date and the commit that they come from.
"""

import json
import pathlib

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

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


def latest(folder):
    """Return the newest record of each kind of device, CPU first."""
    files = sorted(folder.glob("folding-*.json"))
    records = [json.loads(file.read_text("utf-8")) for file in files]
    newest = {}
    for record in sorted(records, key=lambda r: r["provenance"]["date"]):
        newest[record["provenance"]["kind"]] = record
    return [newest[kind] for kind in sorted(newest)]


def table(record):
    """Return a record as MyST: where it is from, and a row for each line."""
    about = record["provenance"]
    head = HEAD.format(
        device=about["device"],
        date=about["date"][:10],
        torch=about["torch"],
        commit=about["commit"][:7],
    )
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
    return "\n\n".join(map(table, latest(folder))) or NONE


class FoldingRecord(SphinxDirective):
    """Show what folding saved."""

    def run(self):
        """Write the tables as MyST and let MyST parse them."""
        folder = pathlib.Path(self.env.srcdir) / "benchmarks" / "records"
        self.env.note_dependency(str(folder))
        box = nodes.container(classes=["folding-record"])
        lines = page(folder).splitlines()
        self.state.nested_parse(
            StringList(lines, str(folder)), self.content_offset, box
        )
        return [box]


def setup(app):
    """Register the directive."""
    app.add_directive("folding-record", FoldingRecord)
    return {"version": "1", "parallel_read_safe": True}
