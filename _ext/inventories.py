"""Links into other projects' documentation, without the network.

Each file ``inventories/NAME.txt`` lists what the docstrings refer to in one
project: its address in the first line, then ``name role page`` a line, where
``$`` in the page stands for the name. Sphinx's inventories are made from it.
"""

import pathlib
import zlib

HEADER = (
    "# Sphinx inventory version 2\n# Project: {name}\n# Version: 0\n"
    "# The remainder of this file is compressed using zlib.\n"
)
LISTS = pathlib.Path(__file__).parent / "inventories"


def entries(lines):
    """Return the lines of an inventory for the lines of a list."""
    for line in lines:
        if line.strip() and not line.startswith("#"):
            name, role, page = line.split()
            # Sphinx itself would replace it at the end of the page only.
            yield f"{name} py:{role} 1 {page.replace('$', name)} -\n"


def write(listed, folder):
    """Write the inventory of one list; return its address and its file."""
    address, *lines = listed.read_text().splitlines()
    inventory = folder / f"{listed.stem}.inv"
    body = zlib.compress("".join(entries(lines)).encode())
    inventory.write_bytes(HEADER.format(name=listed.stem).encode() + body)
    return address, str(inventory)


def point_to(app, config):
    """Give intersphinx the local inventories, before it looks for any."""
    folder = pathlib.Path(app.outdir).parent / "inventories"
    folder.mkdir(parents=True, exist_ok=True)
    config.intersphinx_mapping = {
        listed.stem: write(listed, folder)
        for listed in sorted(LISTS.glob("*.txt"))
    }


def setup(app):
    """Run before intersphinx reads its configuration (priority 800)."""
    app.connect("config-inited", point_to, priority=400)
    return {"version": "1", "parallel_read_safe": True}
