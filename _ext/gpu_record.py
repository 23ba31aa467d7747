"""``{gpu-record} 01_logistic_normalization``: a chapter's latest GPU record.

Shows which device ran the chapter's comparisons with PyTorch, when, how many
there were, and the largest difference, from the files that
``python -m benchmarks.chapters --device cuda`` leaves.
"""

import json
import pathlib

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

NONE = """\
*On a GPU:* not yet recorded. `python -m benchmarks.chapters --device cuda` \
runs this chapter's comparisons on one and records them."""
RECORDED = """\
*On a GPU:* the latest record is from an {device} on {date} (torch {torch}, \
commit {commit}). It made {count} of this chapter's comparisons with PyTorch \
on the device, and the largest difference was {largest:.1e}; the chapter took \
{seconds:.0f} s."""


def latest(folder, chapter):
    """Return the newest GPU record that holds the chapter, or None."""
    files = sorted(folder.glob("chapters-cuda-*.json"))
    records = [json.loads(file.read_text()) for file in files]
    records = [r for r in records if chapter in r["chapters"]]
    return max(records, key=lambda r: r["provenance"]["date"], default=None)


def sentence(record, chapter):
    """Say in one sentence what the record holds."""
    if record is None:
        return NONE
    about, ran = record["provenance"], record["chapters"][chapter]
    on_gpu = [
        c["difference"]
        for c in ran["comparisons"]
        if c["device"].startswith("cuda")
    ]
    return RECORDED.format(
        device=about["device"],
        date=about["date"][:10],
        torch=about["torch"],
        commit=about["commit"][:7],
        count=len(on_gpu),
        largest=max(on_gpu, default=0.0),
        seconds=ran["seconds"],
    )


class GpuRecord(SphinxDirective):
    """Show a chapter's latest GPU record."""

    required_arguments = 1

    def run(self):
        """Write the sentence as MyST and let MyST parse it."""
        folder = pathlib.Path(self.env.srcdir) / "benchmarks" / "records"
        self.env.note_dependency(str(folder))
        chapter = self.arguments[0]
        text = sentence(latest(folder, chapter), chapter)
        box = nodes.container(classes=["gpu-record"])
        self.state.nested_parse(
            StringList([text], str(folder)), self.content_offset, box
        )
        return [box]


def setup(app):
    """Register the directive."""
    app.add_directive("gpu-record", GpuRecord)
    return {"version": "1", "parallel_read_safe": True}
