"""A stand-in for Hugging Face's hub: folders as repositories, over HTTP on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

_COMMIT = "0123456789" * 4


@contextmanager
def hub(repositories: dict[str, Path], cache: Path) -> Iterator[list[str]]:
    """Lets huggingface_hub ask this process, with an empty cache; gives the paths that it asks for.

    Args:
        repositories: {OWNER/NAME: folder}.
        cache: An empty folder.
    """
    from huggingface_hub import constants

    asked: list[str] = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0].strip("/")
            asked.append(path)
            body = _body(path, repositories)
            self.send_response(404 if body is None else 200)
            body = body or b""
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", _COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        try:
            yield asked
        finally:
            server.shutdown()
            server.server_close()


def _body(path: str, repositories: dict[str, Path]) -> bytes | None:
    for name, folder in repositories.items():
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        if path.startswith(f"api/models/{name}/tree/"):
            sizes = {file: (folder / file).stat().st_size for file in files}
            tree = [{"type": "file", "path": f, "size": n, "oid": f} for f, n in sizes.items()]
            return json.dumps(tree).encode()
        if path == f"api/models/{name}" or path.startswith(f"api/models/{name}/revision/"):
            siblings = [{"rfilename": file} for file in files]
            return json.dumps({"id": name, "sha": _COMMIT, "siblings": siblings}).encode()
        _, found, rest = path.partition(f"{name}/resolve/")
        file = folder / rest.partition("/")[2]
        if found and file.is_file():
            return file.read_bytes()
    return None
