"""The few endpoints of the Hugging Face hub that fetching a repository asks for, for its protocol alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.http_server import QuietHandler, serving_http

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serving_hub(repository: str, folder: Path, commit: str = COMMIT) -> Iterator[str]:
    """A server with one public repository, whose only revision is `main`."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    class Hub(QuietHandler):
        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def _answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            if path in {f"/api/models/{repository}/revision/{name}" for name in ("main", commit)}:
                siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
                body = json.dumps({"id": repository, "sha": commit, "siblings": siblings}).encode()
                self._send(200, body, with_body, {"Content-Type": "application/json"})
                return
            if path == f"/api/models/{repository}/tree/{commit}":
                tree = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
                self._send(200, json.dumps(tree).encode(), with_body, {"Content-Type": "application/json"})
                return
            start = f"/{repository}/resolve/"
            name = path.removeprefix(start).partition("/")[2]
            if path.startswith(start) and name in files:
                content = files[name]
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                self._send(200, content, with_body, {"ETag": etag, "X-Repo-Commit": commit})
                return
            error = "RevisionNotFound" if f"/{repository}/revision/" in path else "RepoNotFound"
            self._send(404, b"", with_body, {"X-Error-Code": error})

        def _send(self, status: int, body: bytes, with_body: bool, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    with serving_http(Hub) as url:
        yield url
