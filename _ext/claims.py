"""The ledger of claims, and the cells that settle them.

``{claim-ledger}`` shows ``appendix/claims.yml`` as a table for each source.
Above a notebook cell with the tag ``claim-000-06`` stands a badge, the anchor
of that name, which leads to the row ``ledger-000-06``; the row leads back to
the cell. A row without its cell, or a tag without its row, is a link
without a target, and so a warning.
"""

import collections
import pathlib
import re

import yaml
from docutils import nodes
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

TAG = re.compile(r"tag_(claim-(\d{3}-\d{2}[a-z]?))")
SOURCES = {
    "000": "Batch normalization, notes on a deep learning specialization",
    "001": "BN, LN, IN and GN side by side",
    "002": "TensorFlow's moments and batch_normalization",
    "003": "Batch normalization in a multilayer perceptron, and variants",
    "004": "How does batch normalization help optimization?",
}
BADGES = {"correct": "success", "qualified": "warning", "wrong": "danger"}


def read(root):
    """Return the rows of the ledger's data file."""
    text = (root / "appendix" / "claims.yml").read_text("utf-8")
    try:
        return yaml.safe_load(text) or []
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise ExtensionError(
            f"appendix/claims.yml, line {line}: {error.problem}"
        ) from error


def row(claim):
    """Return one row of a list-table, as MyST."""
    reason = " ".join(claim["reason"].split())
    if claim.get("reference"):
        reason += f" {{cite:p}}`{claim['reference']}`"
    verdict = claim["verdict"]
    number = claim["id"]
    return [
        f"* - (ledger-{number})=",
        f"    {{ref}}`{number} <claim-{number}>`",
        f"  - {' '.join(claim['claim'].split())}",
        f"  - {{bdg-{BADGES[verdict]}}}`{verdict}`",
        f"  - {reason}",
    ]


def table(claims):
    """Return the table of one source, as MyST."""
    lines = [
        "::::{list-table}",
        ":header-rows: 1",
        ":class: ledger",
        "",
        "* - Cell",
        "  - What the source says",
        "  - Verdict",
        "  - Why",
    ]
    for claim in claims:
        lines += row(claim)
    return [*lines, "::::"]


def summary(claims):
    """Return one sentence that counts the verdicts, as MyST."""
    count = collections.Counter(claim["verdict"] for claim in claims)
    parts = ", ".join(f"{count[verdict]} {verdict}" for verdict in BADGES)
    return [f"Settled so far: {len(claims)} claims ({parts})."]


class ClaimLedger(SphinxDirective):
    """Render the ledger of claims."""

    def run(self):
        """Write the ledger as MyST and let MyST parse it."""
        root = pathlib.Path(self.env.srcdir)
        self.env.note_dependency(str(root / "appendix" / "claims.yml"))
        claims = sorted(read(root), key=lambda claim: claim["id"])
        found = self.parsed(summary(claims))
        for source, name in SOURCES.items():
            chosen = [c for c in claims if c["id"].startswith(source)]
            if chosen:
                section = nodes.section(ids=[f"source-{source}"])
                section += nodes.title(text=f"{source}: {name}")
                section += self.parsed(table(chosen))
                found.append(section)
        return found

    def parsed(self, lines):
        """Return the nodes of some lines of MyST."""
        box = nodes.container()
        text = StringList(lines, "appendix/claims.yml")
        self.state.nested_parse(text, self.content_offset, box)
        return box.children


def badge(number, docname):
    """Return a link from a cell to its row in the ledger."""
    link = addnodes.pending_xref(
        "",
        refdomain="std",
        reftype="ref",
        reftarget=f"ledger-{number}",
        refexplicit=True,
        refwarn=True,
        refdoc=docname,
    )
    link += nodes.inline(number, number)
    return nodes.inline("", "", link, classes=["claim-badge"])


def mark_cells(app, doctree):
    """Put a line of badges, which bears the anchors, before tagged cells.

    Before and not into the cell: what is inside may be folded.
    """
    docname = app.env.docname
    labels = app.env.get_domain("std").anonlabels
    for cell in list(doctree.findall(nodes.container)):
        found = [
            match
            for match in map(TAG.fullmatch, cell.get("classes", []))
            if match
        ]
        if not found:
            continue
        words = "settles claims" if len(found) > 1 else "settles claim"
        line = nodes.paragraph(words, words, classes=["claim-badges"])
        for match in found:
            anchor, number = match.groups()
            line["ids"].append(anchor)
            labels[anchor] = (docname, anchor)
            line += badge(number, docname)
        cell.parent.insert(cell.parent.index(cell), line)


def setup(app):
    """Register the directive and mark the cells of every page read."""
    app.add_directive("claim-ledger", ClaimLedger)
    app.connect("doctree-read", mark_cells)
    return {"version": "1", "parallel_read_safe": True}
