"""A scripted chat endpoint on loopback: real sockets, answers by the test's own function."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# request body -> text of the answer, or an HTTP status, or (status, headers), or None: hang up
Script = Callable[[dict[str, Any]], str | int | tuple[int, dict[str, str]] | None]


@dataclass
class Endpoint:
    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    def questions(self) -> list[str]:
        return [str(body["messages"][0]["content"]) for body in self.requests]


@contextmanager
def endpoint(script: Script) -> Iterator[Endpoint]:
    lock = threading.Lock()
    state = Endpoint("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # header and body leave together

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.requests.append(body)
                state.keys.append(self.headers.get("Authorization"))
                state.running += 1
                state.most_running = max(state.most_running, state.running)
            found = script(body) if self.path == "/v1/chat/completions" else 404
            with lock:
                state.running -= 1
            if found is None:
                self.close_connection = True
                return
            status, headers = found if isinstance(found, tuple) else (found, {})
            text = json.dumps({"choices": [{"message": {"role": "assistant", "content": found}}]})
            if isinstance(status, str):
                status = 200
            data = text.encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
