"""``{gpu-record} 01_logistic_normalization``: a chapter's latest GPU record.

Shows which device ran the chapter's comparisons with PyTorch, when, how many
there were, and the largest difference, from the files that
``python -m benchmarks.chapters --device cuda`` leaves.
"""

from record import RecordDirective

from normlib.records import newest, origin

NONE = """\
*On a GPU:* not yet recorded. `python -m benchmarks.chapters --device cuda` \
runs this chapter's comparisons on one and records them."""
RECORDED = """\
*On a GPU:* the latest record is from an {device} on {date} (torch {torch}, \
commit {commit}). It made {count} of this chapter's comparisons with PyTorch \
on the device, and the largest difference was {largest:.1e}; the chapter took \
{seconds:.0f} s."""


def page(folder, chapter):
    """Say what the newest record that holds the chapter says of it."""
    record = newest(
        "chapters-cuda-*.json", folder, lambda r: chapter in r["chapters"]
    )
    if record is None:
        return NONE
    ran = record["chapters"][chapter]
    on_gpu = [
        c["difference"]
        for c in ran["comparisons"]
        if c["device"].startswith("cuda")
    ]
    return RECORDED.format(
        **origin(record["provenance"]),
        count=len(on_gpu),
        largest=max(on_gpu, default=0.0),
        seconds=ran["seconds"],
    )


class GpuRecord(RecordDirective):
    """Show a chapter's latest GPU record."""

    required_arguments = 1
    page = staticmethod(page)


def setup(app):
    """Register the directive."""
    app.add_directive("gpu-record", GpuRecord)
    return {"version": "1", "parallel_read_safe": True}
