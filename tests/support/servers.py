"""Real servers for tests, over HTTP on a free port: `transformers serve`, and one with replies that a test writes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def transformers_server(log: Path) -> Iterator[str]:
    """The base URL of a new `transformers serve`; a request's model is a checkpoint's folder."""
    port = free_port()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    serve = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*serve, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"],
            stdout=stream, stderr=stream, env=environment,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 180
            while True:
                assert process.poll() is None, f"transformers serve ended: {log.read_text()[-2000:]}"
                assert time.monotonic() < deadline, f"transformers serve did not start: {log.read_text()[-2000:]}"
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                    break
                time.sleep(0.3)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(30)


Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]
"""Status, a body (bytes as they are, anything else as JSON), and further headers."""


@dataclasses.dataclass
class Scripted:
    """A server that replies with what a function of (path, body) returns."""

    base_url: str
    bodies: list[dict[str, Any]]
    """Every request's body, in the order they came."""
    most_at_once: int = 0


def said(text: Any, finish: str | None = "stop", **fields: Any) -> Reply:
    """A chat completion; `fields` stand beside the content."""
    message = {"role": "assistant", "content": text, **fields}
    return 200, {"choices": [{"index": 0, "finish_reason": finish, "message": message}]}


@contextlib.contextmanager
def scripted_server(reply: Callable[[str, dict[str, Any]], Reply]) -> Iterator[Scripted]:
    lock, now = threading.Lock(), 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal now
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.bodies.append(body)
                now += 1
                server.most_at_once = max(server.most_at_once, now)
            status, value, *more = reply(self.path, body)
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            with lock:
                now -= 1
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                for name, text in (more[0] if more else {}).items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Scripted(f"http://127.0.0.1:{http.server_address[1]}/v1", [])
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
