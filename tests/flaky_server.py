"""Web server for range requests that fails on demand, for tests of remote storage."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# Temporary faults of a response. Any HTTP status is a fault too, such as 403 and 404.
FAULTS = (
    "drop",  # the connection is closed without a response
    "reset",  # ... is reset
    "garbage",  # a response that is not HTTP
    "late",  # a response after `delay` seconds
    "truncated",  # half of the body, then the connection is closed
    "short",  # a valid response with half of the range
    "other range",  # ... with a range that starts a byte earlier, as its header states
    "whole",  # status 200 and the whole file
    "packed length",  # a Content-Length below the length of the body
    "inflated length",  # ... above it
    "500",
    "503",
    "429",
)


class FlakyServer:
    """Server of `files` (name: bytes) below `url`.

    Each request uses the next item of `faults` (None for a correct response), and `always` after the last item.
    `requests` records (method, name, range or ''). `pieces` is the delay in seconds between two pieces of 64 KiB of a
    body.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.faults: deque[str | None] = deque()
        self.always: str | None = None
        self.delay, self.pieces = 5.0, 0.0
        self.requests: list[tuple[str, str, str]] = []
        self.stopped = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.flaky = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> FlakyServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def downloads(self) -> list[tuple[str, str, str]]:
        return [request for request in self.requests if request[0] == "GET"]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    flaky: FlakyServer

    def handle_error(self, *_: Any) -> None:
        """Ignore disconnected clients, which these tests provoke."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._respond()

    def do_GET(self) -> None:
        self._respond()

    def _respond(self) -> None:
        flaky = self.server.flaky
        name, byte_range = self.path.lstrip("/"), self.headers.get("Range", "")
        flaky.requests.append((self.command, name, byte_range))
        fault = flaky.faults.popleft() if flaky.faults else flaky.always
        body = flaky.files.get(name)
        if fault == "late":
            flaky.stopped.wait(flaky.delay)
        if fault in ("drop", "reset", "garbage"):
            self._disconnect(fault)
        elif fault is not None and fault.isdigit():
            self._send(int(fault), {}, b"sorry")
        elif body is None:
            self._send(404, {}, b"")
        elif not byte_range or fault == "whole":
            self._send(200, {}, body, fault)
        else:
            start, last = (int(number) for number in re.fullmatch(r"bytes=(\d+)-(\d+)", byte_range).groups())
            last = min(last, len(body) - 1)
            if fault == "short":
                last = start + (last - start) // 2
            if fault == "other range":
                start, last = max(0, start - 1), last - 1
            content_range = {"Content-Range": f"bytes {start}-{last}/{len(body)}"}
            self._send(206, content_range, body[start : last + 1], fault)

    def _send(self, status: int, headers: dict[str, str], body: bytes, fault: str | None = None) -> None:
        length = len(body)
        if fault == "packed length":
            length //= 2
        if fault == "inflated length":
            length += 10
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length), "ETag": '"1"'}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "truncated":
            body = body[: length // 2]
        for start in range(0, len(body), 65536):
            self.wfile.write(body[start : start + 65536])
            if self.server.flaky.pieces:
                time.sleep(self.server.flaky.pieces)
        if fault in ("truncated", "inflated length"):
            self._disconnect("drop")

    def _disconnect(self, fault: str) -> None:
        self.close_connection = True
        if fault == "garbage":
            self.wfile.write(b"\x00\x01 this is no HTTP\r\n\r\n")
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
