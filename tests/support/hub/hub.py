"""A stand-in for Hugging Face's hub: folders as repositories, over HTTP on this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

_COMMIT = "0123456789" * 4
TOKEN = "hf_standin"


class Hub(ThreadingHTTPServer):
    """The server.

    Args:
        repositories: {OWNER/NAME: folder}.
        uploads: Where the folders of new repositories are made.

    Attributes:
        repositories: As given, and those that were made since.
        asked: Paths that were asked for.
        created: What was said of each new repository.
        objects: Large files that were uploaded, by their hash.
        refusal: Status by which a new repository is refused; 0 makes the repository.
    """

    def __init__(self, repositories: dict[str, Path], uploads: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repositories, self.uploads, self.refusal = dict(repositories), uploads, 0
        self.asked: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.objects: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.server.asked.append(path)
        if path == "api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self._say({"name": "me", "type": "user"}, 200 if known else 401)
            return
        body = _body(path, self.server.repositories)
        if body is not None:
            self._answer(body, ETag=f'"{sha256(body).hexdigest()}"', X_Repo_Commit=_COMMIT)
        elif path.startswith("api/models/"):
            self._answer(b"", 404, X_Error_Code="RepoNotFound")
        else:
            self._answer(b"", 404)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self._sent()
        self._say({})

    def do_POST(self) -> None:
        hub, path, sent = self.server, self.path.partition("?")[0], self._sent()
        if path == "/api/repos/create":
            if hub.refusal:
                self._say({"error": "refused"}, hub.refusal)
                return
            hub.created.append(json.loads(sent))
            name = "{organization}/{name}".format(**hub.created[-1])
            hub.repositories[name] = hub.uploads / name
            self._say({"url": f"{hub.url}/{name}"})
        elif path.endswith("/preupload/main"):
            files = [
                {"path": file, "uploadMode": _mode(file), "shouldIgnore": False}
                for file in (file["path"] for file in json.loads(sent)["files"])
            ]
            self._say({"files": files})
        elif path.endswith("/objects/batch"):
            objects = [
                {**it, "actions": {"upload": {"href": f"{hub.url}/objects/{it['oid']}"}}}
                for it in json.loads(sent)["objects"]
            ]
            self._say({"transfer": "basic", "objects": objects})
        elif path.endswith("/commit/main"):
            name = path.split("/api/models/")[1].removesuffix("/commit/main")
            for entry in map(json.loads, sent.splitlines()):
                if entry["key"] in ("file", "lfsFile"):
                    value = entry["value"]
                    file = hub.repositories[name] / value["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    is_small = entry["key"] == "file"
                    file.write_bytes(
                        base64.b64decode(value["content"])
                        if is_small
                        else hub.objects[value["oid"]]
                    )
            self._say({"commitUrl": f"{hub.url}/{name}/commit/{_COMMIT}", "commitOid": _COMMIT})
        else:  # What it asks about the card's metadata.
            self._say({})

    def _sent(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _say(self, content: Any, status: int = 200) -> None:
        self._answer(json.dumps(content).encode(), status)

    def _answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def hub(repositories: dict[str, Path], cache: Path) -> Iterator[Hub]:
    """Lets huggingface_hub ask this process, with an empty cache.

    Args:
        repositories: {OWNER/NAME: folder}.
        cache: An empty folder.
    """
    from huggingface_hub import constants

    server = Hub(repositories, cache.with_name("uploads"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        # Its own protocol of uploads goes to another server.
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        try:
            yield server
        finally:
            server.shutdown()
            server.server_close()


def _mode(file: str) -> str:
    return "lfs" if file.endswith(".safetensors") else "regular"


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
