"""A chapter has the number of its file: ``chapters/05_...`` is chapter 5.

Sphinx numbers the chapters of a part by their position. While the book
grows, chapters are missing in between, and a reader who looks for chapter 5
would find it under "3.". So the first part of each number is replaced, in
headings, contents, figures and equations, when Sphinx has numbered them.
"""

import re

from docutils import nodes

FILE = re.compile(r"chapters/0*(\d+)_")


def renumbered(docname, number):
    """Return a number with the file's number in front, where it has one."""
    found = FILE.match(docname)
    return (int(found[1]), *number[1:]) if found and number else number


def renumber(app, env):
    """Mend every number that Sphinx keeps for later."""
    for docname, numbers in env.toc_secnumbers.items():
        for anchor, number in numbers.items():
            numbers[anchor] = renumbered(docname, number)
    for docname, kinds in env.toc_fignumbers.items():
        for numbers in kinds.values():
            for label, number in numbers.items():
                numbers[label] = renumbered(docname, number)
    for docname, title in env.titles.items():
        if "secnumber" in title:
            title["secnumber"] = renumbered(docname, title["secnumber"])
    for contents in env.tocs.values():
        for link in contents.findall(nodes.reference):
            if "secnumber" in link:
                link["secnumber"] = renumbered(
                    link["refuri"], link["secnumber"]
                )
    return []


def setup(app):
    """Run after Sphinx' own numbering."""
    app.connect("env-get-updated", renumber, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
