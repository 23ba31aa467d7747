"""What the directives that show the newest records share.

No extension of its own: those beside it that end in ``_record`` are.
"""

import pathlib

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from normlib.records import FOLDER

KINDS = {"cpu": "a CPU", "cuda": "a GPU"}
"""Of devices, in the order of the page."""


class RecordDirective(SphinxDirective):
    """Show what the records say, in a box of the directive's name.

    A subclass has ``page(folder, *arguments)``, which returns MyST.
    """

    def run(self):
        """Write the page as MyST and let MyST parse it."""
        folder = pathlib.Path(self.env.srcdir) / FOLDER
        self.env.note_dependency(str(folder))
        box = nodes.container(classes=[self.name])
        lines = self.page(folder, *self.arguments).splitlines()
        self.state.nested_parse(
            StringList(lines, str(folder)), self.content_offset, box
        )
        return [box]
