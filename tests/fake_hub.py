"""Web server that imitates the Hugging Face hub for one dataset, as far as `datasets` and hf:// use it."""

from __future__ import annotations

import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "a" * 40


class FakeHub:
    """Server of a folder as the dataset `name` below `url`. `requests` records (method, path, range or '')."""

    def __init__(self, folder: Path, name: str, gated: bool = False) -> None:
        self.folder, self.name, self.gated = folder, name, gated
        self.requests: list[tuple[str, str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        byte_range, path = self.headers.get("Range") or "", urllib.parse.unquote(self.path)
        self.hub.requests.append((self.command, path, byte_range))
        name = re.escape(self.hub.name)
        api = re.fullmatch(rf"/api/datasets/{name}(?:/(revision|tree)/[^/?]+(?:/([^?]*))?)?(?:\?.*)?", path)
        file = re.fullmatch(rf"/datasets/{name}/resolve/[^/]+/(.+)", path)
        if (api or file) and self.hub.gated:
            self._send(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted."})
        elif api and api[1] == "tree":
            self._tree(self.hub.folder / (api[2] or ""))
        elif api:
            files = [{"rfilename": self._name(path)} for path in self.hub.folder.rglob("*") if path.is_file()]
            info = {"id": self.hub.name, "sha": COMMIT, "private": False, "disabled": False, "gated": False}
            self._send(200, json.dumps(info | {"downloads": 0, "likes": 0, "tags": [], "siblings": files}).encode())
        elif file and (self.hub.folder / file[1]).is_file():
            self._file((self.hub.folder / file[1]).read_bytes(), byte_range)
        else:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound" if file else "RepoNotFound"})

    do_HEAD = do_GET

    def _name(self, path: Path) -> str:
        return path.relative_to(self.hub.folder).as_posix()

    def _tree(self, folder: Path) -> None:
        entries = [
            {"type": "file", "path": self._name(path), "size": path.stat().st_size, "oid": "b" * 40}
            if path.is_file()
            else {"type": "directory", "path": self._name(path), "size": 0, "oid": "c" * 40}
            for path in sorted(folder.iterdir())
        ]
        self._send(200, json.dumps(entries).encode())

    def _file(self, body: bytes, byte_range: str) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", byte_range)
        if not match:
            return self._send(200, body, {"ETag": f'"{"b" * 40}"'})
        first, last = int(match[1]), min(int(match[2] or len(body)), len(body) - 1)
        self._send(206, body[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(body)}"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        standard = {"Content-Length": str(len(body)), "Content-Type": "application/json", "X-Repo-Commit": COMMIT}
        for name, value in {**standard, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
