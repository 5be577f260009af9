"""The client's end of one answer: what was sent, and whether anybody is still there."""

import logging
from collections.abc import Callable, Iterable

from gateway.relay.http_in import Header, Receive, Scope, Send
from gateway.relay.watchdog import DeadlineMissed, Watchdog

log = logging.getLogger("gateway.relay")


class Client:
    """Sends while the client is there; afterwards sending does nothing, so the relay goes on."""

    __slots__ = (
        "_abort",
        "_dog",
        "_left",
        "_over",
        "_send",
        "_stall_s",
        "gone",
        "head_sent",
        "status",
    )

    def __init__(
        self, scope: Scope, send: Send, dog: Watchdog, stall_s: float, left: Callable[[], None]
    ) -> None:
        """left is called once, when the client goes before its answer is complete."""
        self._send = send
        self._dog = dog
        self._stall_s = stall_s
        self._left = left
        # Set by our server protocol: closing politely would wait for a client that stopped reading.
        self._abort: Callable[[], None] | None = scope.get("farebox.abort")
        self._over = False
        self.gone = False
        self.head_sent = False
        self.status = 0

    async def watch(self, receive: Receive) -> None:
        """Wait until the client hangs up or its answer is complete."""
        while (await receive())["type"] != "http.disconnect":
            pass
        if not self._over:
            self._lose()

    async def head(self, status: int, headers: Iterable[Header]) -> None:
        if self.gone:
            return
        self.head_sent = True
        self.status = status
        await self._put({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def body(self, data: bytes, *, more: bool) -> None:
        if self.gone:
            return
        self._over = self._over or not more
        await self._put({"type": "http.response.body", "body": data, "more_body": more})

    async def _put(self, message: dict[str, object]) -> None:
        try:
            await self._dog.wait(self._send(message), self._stall_s)
        except DeadlineMissed:
            # It stopped reading. What it did not take is in no buffer of ours for long.
            self._lose()
            if self._abort is not None:
                self._abort()
        except (OSError, RuntimeError) as exc:
            # The connection went between its loss and our being told: uvloop refuses the write.
            log.warning("client.send_failed", extra={"error": str(exc)})
            self._lose()

    def _lose(self) -> None:
        if not self.gone:
            self.gone = True
            self._left()
