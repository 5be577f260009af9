"""An ASGI application behind an Exchange: how the control plane's framework is reached.

https://asgi.readthedocs.io/en/latest/specs/www.html
Failure: a body that does not come in time is a 400; who takes no answer loses the connection.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from gateway.errors import late_body
from gateway.http1.exchange import Exchange

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class _Channel:
    def __init__(self, exchange: Exchange, body_s: float, write_stall_s: float) -> None:
        self.exchange = exchange
        self.has_sent_all = False
        self.body_due = asyncio.get_running_loop().time() + body_s
        self.write_stall_s = write_stall_s

    async def receive(self) -> Message:
        exchange = self.exchange
        if not self.has_sent_all:
            await self._more_body()
            if not exchange.gone:
                self.has_sent_all = exchange.is_whole
                body = exchange.take_body()
                return {"type": "http.request", "body": body, "more_body": not exchange.is_whole}
        await exchange.closed()
        return {"type": "http.disconnect"}

    async def _more_body(self) -> None:
        if self.exchange.is_whole:
            return
        try:
            async with asyncio.timeout_at(self.body_due):
                await self.exchange.more_body()
        except TimeoutError as exc:
            raise late_body() from exc

    async def send(self, message: Message) -> None:
        exchange = self.exchange
        if message["type"] == "http.response.start":
            exchange.start(message["status"], message.get("headers", ()))
        elif message.get("more_body", False):
            exchange.write(message.get("body", b""))
            await self._drained()
        else:
            exchange.end(message.get("body", b""))

    async def _drained(self) -> None:
        try:
            async with asyncio.timeout(self.write_stall_s):
                await self.exchange.drained()
        except TimeoutError:
            self.exchange.lose()
            self.exchange.abort()


async def serve_asgi(app: Any, exchange: Exchange, *, body_s: float, write_stall_s: float) -> None:
    """Serve one exchange by an ASGI application.

    body_s: for all of the request's body. write_stall_s: for a client that takes nothing.
    """
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
    channel = _Channel(exchange, body_s, write_stall_s)
    await app(scope, channel.receive, channel.send)
