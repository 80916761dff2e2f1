"""A hub on the loopback with repositories of our own: what huggingface_hub asks of one, and what can go wrong there."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """Repositories by name, each with its files; `requests`: what was asked; `cut`: where a file ends too early."""

    files: dict[str, dict[str, bytes]]
    revisions: tuple[str, ...] = ("main", COMMIT)
    gated: tuple[str, ...] = ()
    cut: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub at hub.url until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|tree)/([^/]+))?", path):
                repository, revision = found[1], found[2] or "main"
                if self._refused(repository, revision):
                    return
                files = [
                    {"type": "file", "rfilename": name, "path": name, "size": len(content), "oid": _etag(content)}
                    for name, content in hub.files[repository].items()
                ]
                listing = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": files, "tags": []}
                self._send(200, json.dumps(files if "/tree/" in path else listing).encode(), body)
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                repository, revision, name = found.groups()
                if self._refused(repository, revision):
                    return
                content = hub.files[repository].get(name)
                if content is None:
                    self._send(404, b"", body, **{"X-Error-Code": "EntryNotFound"})
                    return
                self._send_file(f"{repository}/{name}", content, body)
            else:
                self._send(404, b"", body)

        def _refused(self, repository: str, revision: str) -> bool:
            code = None
            if repository not in hub.files:
                code = (401, "RepoNotFound")
            elif repository in hub.gated and self.headers.get("Authorization") != "Bearer hf_known":
                code = (403, "GatedRepo")
            elif revision not in hub.revisions:
                code = (404, "RevisionNotFound")
            if code is not None:
                self._send(code[0], b"{}", self.command == "GET", **{"X-Error-Code": code[1]})
            return code is not None

        def _send_file(self, name: str, content: bytes, body: bool) -> None:
            start, status = 0, 200
            headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, status = int(asked[1]), 206
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            rest = content[start:]
            limit = hub.cut.pop(name, None) if body else None
            self._send(status, rest, body, rest if limit is None else rest[:limit], **headers)
            if limit is not None:
                self.close_connection = True

        def _send(self, status: int, content: bytes, body: bool, sent: bytes | None = None, **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            if body:
                self.wfile.write(content if sent is None else sent)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
