"""Execute the notebooks again when what they import or read has changed.

jupyter-cache knows a notebook by its own code, so that an edit of the
package would show stale outputs, and so would a new record of the full-size
experiments or of the speed. This extension keeps a fingerprint of these, and
of the libraries under the package, beside the cache. When it differs, the
cache is emptied and every page that runs code is read again.

The kernels compute on one thread each unless told otherwise: the networks of
the chapters are too small to gain from more, and lose much where other
processes use the same cores.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil

from sphinx.util import logging

LIBRARIES = ("matplotlib", "numpy", "scikit-learn", "torch")
logger = logging.getLogger(__name__)


def fingerprint(root):
    """Return one hash of the package's source, its libraries and records."""
    digest = hashlib.sha256(platform.python_version().encode())
    for name in LIBRARIES:
        digest.update(f"{name}{importlib.metadata.version(name)}".encode())
    sources = sorted((root / "normlib").rglob("*.py"))
    folder = root / "benchmarks" / "records"
    records = [*folder.glob("reproduce-*.json"), *folder.glob("speed-*.json")]
    for source in [*sources, *sorted(records)]:
        digest.update(source.relative_to(root).as_posix().encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()


def empty_stale_cache(app, config):
    """Empty the cache of executed notebooks where it is out of date."""
    root = pathlib.Path(app.srcdir)
    cache = pathlib.Path(
        config.nb_execution_cache_path
        or pathlib.Path(app.outdir).parent / ".jupyter_cache"
    )
    now = fingerprint(root)
    kept = cache.parent / "normlib.sha256"
    if cache.exists() and not (kept.exists() and kept.read_text() == now):
        logger.info("normlib has changed: the notebooks are executed again")
        shutil.rmtree(cache)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(now)
    config.normlib_fingerprint = now


def read_again(app, env, added, changed, removed):
    """Name the pages that run code, where the package has changed."""
    now = app.config.normlib_fingerprint
    before = getattr(env, "normlib_fingerprint", None)
    env.normlib_fingerprint = now
    if before == now:
        return []
    return [
        name
        for name in env.found_docs
        if env.doc2path(name).endswith(".ipynb")
    ]


def setup(app):
    """Connect the two halves; both cost a few milliseconds."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    app.add_config_value("normlib_fingerprint", "", "")
    app.connect("config-inited", empty_stale_cache)
    app.connect("env-get-outdated", read_again)
    return {"version": "1", "parallel_read_safe": True}
