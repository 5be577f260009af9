"""A node that misbehaves: a real HTTP server in front of a real node that alters its answers."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import msgspec


class RpcError(Exception):
    """Raised by what alters answers: the node says no."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


Alter = Callable[[str, list[Any], Any], Any]


class RpcProxy:
    """What it answers: as the node, unless one of these says otherwise."""

    def __init__(self, node_url: str) -> None:
        self.alter: Alter | None = None
        """Of method, parameters and the true result: the result that is told."""
        self.raw: tuple[int, bytes, dict[str, str]] | None = None
        """Status, body and headers in place of any answer."""
        self.is_other_id = False
        """The answers are those to other questions."""
        self.hang: threading.Event | None = None
        """Nothing is answered before it is set."""
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""
        self._client = httpx.Client(base_url=node_url, timeout=10)

    def honest(self) -> None:
        self.alter = self.raw = self.hang = None
        self.is_other_id = False

    def answer(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        asked = msgspec.json.decode(body)
        self.asked.append(asked["method"])
        if self.hang is not None:
            self.hang.wait(20)
        if self.raw is not None:
            return self.raw
        told = self._client.post("", content=body, headers={"content-type": "application/json"})
        answer = told.json()
        if self.alter is not None and "result" in answer:
            answer = self._altered(asked, answer)
        if self.is_other_id:
            answer["id"] += 1
        return 200, msgspec.json.encode(answer), {"content-type": "application/json"}

    def _altered(self, asked: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        assert self.alter is not None
        try:
            result = self.alter(asked["method"], asked["params"], answer["result"])
        except RpcError as exc:
            said = {"code": exc.code, "message": "no"}
            return {"jsonrpc": "2.0", "id": asked["id"], "error": said}
        return {**answer, "result": result}

    def close(self) -> None:
        self._client.close()


@contextmanager
def running_proxy(node_url: str) -> Iterator[RpcProxy]:
    """On a free port of 127.0.0.1."""
    proxy = RpcProxy(node_url)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body at once: else each answer waits for an acknowledgement
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            proxy.headers.append({name.lower(): value for name, value in self.headers.items()})
            body = self.rfile.read(int(self.headers["content-length"]))
            status, answer, headers = proxy.answer(body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}/v2/the-secret-of-this-node"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield proxy
    finally:
        if proxy.hang is not None:
            proxy.hang.set()
        server.shutdown()
        server.server_close()
        thread.join()
        proxy.close()
