"""A real HTTP server on localhost, in a thread, with the faults that downloads meet."""

import dataclasses
import math
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

PIECE_BYTES = 1 << 14


@dataclass(frozen=True, slots=True)
class SeenRequest:
    """A request as the server saw it; `range` is its Range header."""

    path: str
    range: str | None


@dataclass(slots=True)
class Faults:
    """What goes wrong; all of it may change while the server runs.

    statuses: answered to the next requests, one each. drop_after: bytes of a body after which the
    connection is cut, for the next `drops` bodies. stall_after: bytes of a body after which nothing more comes.
    """

    statuses: list[int] = field(default_factory=list)
    drop_after: int | None = None
    drops: float = math.inf
    stall_after: int | None = None
    ignore_range: bool = False
    send_length: bool = True


class FileServer:
    """Serves `files` (by path, such as `/a.tar.gz`) with Range support; a context manager."""

    def __init__(self, files: Mapping[str, bytes], **faults: object) -> None:
        self.files = dict(files)
        self.faults = Faults(**faults)
        self.requests: list[SeenRequest] = []
        self.stalled = threading.Event()
        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def ranges(self) -> list[str | None]:
        """The Range headers of all requests, in order."""
        return [request.range for request in self.requests]

    def __enter__(self) -> "FileServer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests.append(SeenRequest(self.path, self.headers["Range"]))
                # As they are now: a client that has the head may change them before the body is sent.
                faults = dataclasses.replace(server.faults)
                if faults.statuses:
                    self.send_error(faults.statuses.pop(0))
                    return
                content = server.files.get(self.path)
                if content is None:
                    self.send_error(404)
                    return
                server.faults.drops -= 1
                start = self._begin(content, faults)
                if start is not None:
                    self._send(content[start:], faults)

            def _begin(self, content: bytes, faults: Faults) -> int | None:
                """Send the head; return where the body begins, None where there is none."""
                asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
                start = int(asked[1]) if asked and not faults.ignore_range else 0
                if start and start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.end_headers()
                    return None
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                if faults.send_length:
                    self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                return start

            def _send(self, body: bytes, faults: Faults) -> None:
                limit = len(body)
                if faults.drop_after is not None and faults.drops > 0:
                    limit = min(limit, faults.drop_after)
                if faults.stall_after is not None:
                    limit = min(limit, faults.stall_after)
                try:
                    for place in range(0, limit, PIECE_BYTES):
                        self.wfile.write(body[place : min(place + PIECE_BYTES, limit)])
                    if faults.stall_after is not None:
                        server.stalled.set()
                        server._closing.wait()
                except OSError:  # the client went away, as it may
                    self.close_connection = True

            def log_message(self, *arguments: object) -> None:
                """No log: the tests look at `requests`."""

        return Handler
