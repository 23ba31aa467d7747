"""Keep every request of the built pages on the reader's own server.

sphinx-thebe names its CDN on every page, even where it is switched off.
"""


def drop_thebe(app, pagename, templatename, context, doctree):
    """Take sphinx-thebe's scripts, twice on each page, out of the page."""
    context["script_files"] = [
        script
        for script in context.get("script_files", [])
        if "thebe" not in (script.filename or "").lower()
        and "thebe" not in script.attributes.get("body", "").lower()
    ]


def setup(app):
    """Run after sphinx-thebe has added its assets."""
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"version": "1", "parallel_read_safe": True}
