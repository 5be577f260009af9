"""The client's end of one answer: what was sent, and whether anybody is still there."""

from collections.abc import Callable, Iterable

from gateway.http1.exchange import Exchange, Header
from gateway.relay.watchdog import DeadlineMissed, Watchdog


class Client:
    """Sends while the client is there; afterwards sending does nothing, so the relay goes on."""

    __slots__ = ("_dog", "_stall_s", "exchange", "status")

    def __init__(
        self, exchange: Exchange, dog: Watchdog, stall_s: float, left: Callable[[], None]
    ) -> None:
        """left is called once, when the client goes before its answer is complete."""
        self.exchange = exchange
        self._dog = dog
        self._stall_s = stall_s
        self.status = 0
        exchange.on_gone = left
        if exchange.gone:
            left()

    @property
    def gone(self) -> bool:
        return self.exchange.gone

    @property
    def head_sent(self) -> bool:
        return self.exchange.is_started

    def head(self, status: int, headers: Iterable[Header]) -> None:
        """It leaves with the first bytes of the body."""
        if not self.exchange.gone:
            self.status = status
            self.exchange.start(status, headers)

    def last(self, data: bytes) -> None:
        """The end of the answer."""
        self.exchange.end(data)

    async def body(self, data: bytes) -> None:
        """Send a part, and wait while the client does not keep up."""
        self.exchange.write(data)
        if self.exchange.is_blocked:
            await self.drained()

    async def drained(self) -> None:
        """Wait until the client reads again; one that stays away too long is given up."""
        try:
            await self._dog.wait(self.exchange.drained(), self._stall_s)
        except DeadlineMissed:
            # It stopped reading. What it did not take is in no buffer of ours for long.
            self.exchange.lose()
            self.exchange.abort()

    def forget(self) -> None:
        """Nobody waits for the client's leaving any more."""
        self.exchange.on_gone = None
