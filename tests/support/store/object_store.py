"""A real S3 server on the loopback, and a proxy before it that fails on demand."""

from __future__ import annotations

import http.client
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Store:
    """The server and its proxy.

    Attributes:
        url: Address of the proxy.
        faults: What the next answers with content suffer, for each object from the first one on:
            "503", "cut" (half of the content, then the end of the connection), "stall" (half, then
            nothing), "slow" (in small pieces), "" (nothing).
        asked: (method, path) of each request since the start.
        released: Set to end what stalls.
    """

    def __init__(self, server: tuple[str, int]) -> None:
        self.faults: list[str] = []
        self._suffered: dict[str, int] = {}
        self.asked: list[tuple[str, str]] = []
        self.released = threading.Event()
        self._guard = threading.Lock()
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                back = http.client.HTTPConnection(*server, timeout=60)
                back.request(self.command, self.path, body, dict(self.headers))
                answer = back.getresponse()
                content = answer.read()
                back.close()
                with store._guard:
                    store.asked.append((self.command, self.path))
                    # Only of objects: a listing is no more than a few bytes.
                    counts = self.command == "GET" and "list-type" not in self.path
                    fault = store._next_fault(self.path) if counts else ""
                if fault == "503":
                    self._send(503, {"Content-Type": "application/xml"}, _SLOW_DOWN)
                    return
                headers = {
                    name: value
                    for name, value in answer.getheaders()
                    if name.lower() not in ("transfer-encoding", "connection", "content-length")
                }
                if self.command == "HEAD":
                    headers["Content-Length"] = answer.getheader("Content-Length") or "0"
                self._send(answer.status, headers, content, fault)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

            def _send(
                self, status: int, headers: dict[str, str], content: bytes, fault: str = ""
            ) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                if fault in ("cut", "stall"):
                    self.wfile.write(content[: len(content) // 2])
                    self.wfile.flush()
                    if fault == "stall":
                        store.released.wait(60)
                    self.close_connection = True
                    return
                step = max(1, len(content) // 7) if fault == "slow" else max(1, len(content))
                for start in range(0, len(content), step):
                    self.wfile.write(content[start : start + step])
                    self.wfile.flush()
                    if fault == "slow":
                        store.released.wait(0.01)

        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._proxy.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._proxy.server_port}"
        threading.Thread(target=self._proxy.serve_forever, args=(0.01,), daemon=True).start()

    def suffer(self, *faults: str) -> None:
        """Sets the faults of each object, from the first one on."""
        with self._guard:
            self.faults[:], self._suffered = faults, {}

    def _next_fault(self, path: str) -> str:
        number = self._suffered[path] = self._suffered.get(path, -1) + 1
        return self.faults[number] if number < len(self.faults) else ""

    def close(self) -> None:
        """Ends the proxy."""
        self.released.set()
        self._proxy.shutdown()
        self._proxy.server_close()

    def upload(self, folder: Path, bucket: str, prefix: str) -> None:
        """Puts a folder's files into a bucket, which is made if it is not there."""
        client = self.client()
        client.create_bucket(Bucket=bucket)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                key = f"{prefix}{path.relative_to(folder)}"
                body = path.read_bytes()
                client.put_object(Bucket=bucket, Key=key, Body=body, ACL="public-read")

    def client(self):
        """A client of the store."""
        import boto3

        return boto3.client("s3", endpoint_url=self.url, region_name="us-east-1")


_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def serving() -> Iterator[Store]:
    """Starts a server and its proxy."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    # Those of an earlier server, whose address stood in the environment, are kept by fsspec.
    S3FileSystem.clear_instance_cache()

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    store = Store(server.get_host_and_port())
    try:
        yield store
    finally:
        store.close()
        server.stop()
