"""Secrets of a URL stay in recipe.json: a run, its report, plan, export and messages show none."""

from __future__ import annotations

import re
import stat
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from launch import ROOT, run_ranks
from pictures import write_pictures

for _package in ("aiohttp", "fsspec"):
    pytest.importorskip(_package)

PASSWORD, SIGNATURE = "swordfish-of-nobody", "e3b0c44298fc1c149afbf4c8996fb924"
FLAGS = """
--recipe fd_swinv2g
--student.architecture.embed_dim 32 --student.architecture.depths 1 1
--student.architecture.num_heads 1 2 --student.architecture.window_size 4
--teacher.architecture.embed_dim 16 --teacher.architecture.depths 1 1
--teacher.architecture.num_heads 1 2 --teacher.architecture.window_size 4
--teacher.source random --data.image_size 32 --data.workers 1 --runtime.log_every 1
--optim.warmup_epochs 0 --batch.global_batch_size 4 --batch.micro_batch_size 4
"""


class Ranges(SimpleHTTPRequestHandler):
    """A folder on the loopback, read in ranges; a name with `gone` in it breaks the line."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        """Tells the size."""
        if self._is_there():
            self._answer(b"", self._file().stat().st_size)

    def do_GET(self) -> None:
        """Sends a range."""
        if "gone" in self.path:
            self.close_connection = True
            return
        if not self._is_there():
            return
        content = self._file().read_bytes()
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = map(int, match.groups())
            part = content[first : last + 1]
            self._answer(part, len(part), 206, f"bytes {first}-{last}/{len(content)}")
        else:
            self._answer(content, len(content))

    def _is_there(self) -> bool:
        if not (found := self._file().is_file()):
            self.send_error(404)
        return found

    def _file(self) -> Path:
        return Path(self.directory, self.path.partition("?")[0].lstrip("/"))

    def _answer(self, body: bytes, size: int, status: int = 200, span: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        self.send_header("Accept-Ranges", "bytes")
        if span:
            self.send_header("Content-Range", span)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A server with a shard of images."""
    folder = tmp_path / "served"
    folder.mkdir()
    for name in ("x", "gone"):
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for picture in sorted(write_pictures(tmp_path / "pictures", 12).iterdir()):
                archive.add(picture, picture.name)
    handler = partial(Ranges, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://user:{PASSWORD}@127.0.0.1:{server.server_port}"
        server.shutdown()


def leaks(folder: Path) -> list[str]:
    """The files below a folder that hold a secret, in their name or their bytes."""
    found = []
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        held = str(path.relative_to(folder)).encode() + content
        if any(secret.encode() in held for secret in (PASSWORD, SIGNATURE)):
            found.append(str(path.relative_to(folder)))
    return found


def test_no_file_and_no_output_shows_a_secret(address: str, tmp_path: Path) -> None:
    source = f"{address}/x.tar?X-Amz-Signature={SIGNATURE}"
    run, home = tmp_path / "run", tmp_path / "home"
    env = {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "AWS_SECRET_ACCESS_KEY": PASSWORD,
        "WANDB_API_KEY": PASSWORD * 2,
        "WANDB_MODE": "offline",
    }
    home.mkdir()

    def command(*words: object, code: int = 0) -> str:
        done = run_ranks(ROOT / "fd_large/__main__.py", *words, ranks=1, env=env, check=False)
        (output,) = done.outputs
        assert done.returncodes == [code], output
        assert PASSWORD not in output
        assert SIGNATURE not in output
        return output

    config = ("--deepspeed_config", ROOT / "ds_configs/zero2.json")
    train = ("train", *config, *FLAGS.split(), "--runtime.run_dir", run, "--data.root")
    trackers = ("--runtime.trackers", "tensorboard", "mlflow", "wandb")
    command(*train, source, *trackers, "--optim.max_steps", "2", "--runtime.save_every", "1")
    command("report", run)
    command("export", run, tmp_path / "exported", "--to", "fd")
    command("checkpoint", "list", run)
    # A resume that is refused, one whose URL is wrong, one whose line breaks.
    command(*train, source.replace("x.tar", "y.tar"), "--optim.base_lr", "7", code=2)
    command(*train, source.replace("x.tar", "no.tar"), "--fresh", code=2)
    command(*train, source.replace("x.tar", "gone.tar"), "--fresh", code=75)
    assert leaks(run) == ["recipe.json"]
    assert "***@127.0.0.1" in (run / "report.html").read_text()
    assert leaks(tmp_path / "exported") == []
    assert leaks(home) == []
    assert (tmp_path / "mlruns").exists()
    assert leaks(tmp_path / "mlruns") == []
    assert stat.S_IMODE((run / "recipe.json").stat().st_mode) == 0o600
    # It is what a resume needs.
    command("train", *config, "--config", run / "recipe.json", "--optim.max_steps", "3")
