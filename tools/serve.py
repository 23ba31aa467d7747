"""Show the built pages on this machine: ``python tools/serve.py 8000``."""

import functools
import http.server
import pathlib
import sys

PAGES = pathlib.Path(__file__).parents[1] / "_build" / "html"


class Pages(http.server.SimpleHTTPRequestHandler):
    """The pages' files, without a line for each request."""

    def log_message(self, *_):
        """Say nothing."""


def server(port):
    """Return a server of the pages on 127.0.0.1; port 0 takes a free one."""
    handler = functools.partial(Pages, directory=str(PAGES))
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)


def main():
    """Serve until interrupted."""
    if not (PAGES / "index.html").exists():
        sys.exit("normlib: no pages yet, run `make book` first")
    port = int(sys.argv[1]) if sys.argv[1:] else 8000
    try:
        served = server(port)
    except OSError as error:
        sys.exit(
            f"normlib: port {port}: {error.strerror} "
            f"(choose another: make serve PORT={port + 1})"
        )
    print(f"normlib: the book is at http://127.0.0.1:{port} (Ctrl-C ends)")
    try:
        served.serve_forever()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
