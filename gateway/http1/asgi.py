"""An ASGI application behind an Exchange: how the control plane's framework is reached.

https://asgi.readthedocs.io/en/latest/specs/www.html
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from gateway.http1.exchange import Exchange

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class _Channel:
    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.has_sent_all = False

    async def receive(self) -> Message:
        exchange = self.exchange
        if not self.has_sent_all:
            await exchange.more_body()
            if not exchange.gone:
                self.has_sent_all = exchange.is_whole
                body = exchange.take_body()
                return {"type": "http.request", "body": body, "more_body": not exchange.is_whole}
        await exchange.closed()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        exchange = self.exchange
        if message["type"] == "http.response.start":
            exchange.start(message["status"], message.get("headers", ()))
        elif message.get("more_body", False):
            exchange.write(message.get("body", b""))
            await exchange.drained()
        else:
            exchange.end(message.get("body", b""))


async def serve_asgi(app: Any, exchange: Exchange) -> None:
    """Serve one exchange by an ASGI application."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": exchange.method.decode("ascii"),
        "scheme": "http",
        "path": exchange.path,
        "raw_path": exchange.raw_path,
        "query_string": exchange.target.partition(b"?")[2],
        "root_path": "",
        "headers": exchange.headers,
        "client": exchange.peer,
        "server": None,
        "state": {},
    }
    channel = _Channel(exchange)
    await app(scope, channel.receive, channel.send)
