"""What nbval compares, for every notebook of the book.

Values that are printed must be the same on every machine. Pictures, pages and
warnings may differ in a pixel, an id or a path.
"""

NOT_COMPARED = ("image/svg+xml", "image/png", "text/html", "stderr")


def pytest_collectstart(collector):
    """Tell nbval which kinds of output differ from machine to machine."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += NOT_COMPARED
