"""A TCP proxy that fails on demand, each direction for itself.

Modes of a direction: PASS forwards, TRICKLE forwards byte by byte, STALL reads nothing (the
sender's buffers fill), SWALLOW reads and forgets. A delay holds every piece back for that long, in
order; `cut_after` bytes the connections are cut, whatever stands there. `cut` ends the connections
at once, `reset` does so with RST on both sides, `half_open` lets the far side vanish without a
word, `refuse` takes no new ones.
Failure: an error of either side closes both; nothing is raised into the test.
"""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from enum import StrEnum
from urllib.parse import urlsplit, urlunsplit

PIECE_BYTES = 64 * 1024


class Mode(StrEnum):
    PASS = "pass"
    TRICKLE = "trickle"
    STALL = "stall"
    SWALLOW = "swallow"


class Direction:
    """What happens to bytes on their way to one side."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.bytes = 0
        self.cut_after: int | None = None
        self._mode = Mode.PASS
        self._changed = asyncio.Event()

    @property
    def mode(self) -> Mode:
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self._mode = mode
        self._changed.set()
        self._changed = asyncio.Event()

    async def ready(self) -> None:
        while self._mode is Mode.STALL:
            await self._changed.wait()

    def allowed(self, data: bytes) -> bytes:
        """As much of it as may pass before the cut."""
        if self.cut_after is None:
            return data
        data = data[: self.cut_after]
        self.cut_after -= len(data)
        return data

    async def pass_on(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        size = 1 if self._mode is Mode.TRICKLE else PIECE_BYTES
        for at in range(0, len(data), size):
            self.bytes += len(data[at : at + size])
            writer.write(data[at : at + size])
            await writer.drain()
            if size == 1:
                await asyncio.sleep(0)  # a piece of its own, where the other side reads at once


class FaultProxy:
    """In front of one server."""

    def __init__(self, url: str) -> None:
        self._target = ("", 0)
        self.lead_to(url)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._running: set[asyncio.Task[None]] = set()
        self._is_refusing = False
        self.to_server = Direction()
        self.to_client = Direction()
        self.accepted = 0

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def open(self) -> int:
        """Connections that are open now."""
        return len(self._running)

    def lead_to(self, url: str) -> None:
        """New connections go to this server from now on."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._target = (parts.hostname, parts.port)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in list(self._running):
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
        await self._server.wait_closed()

    def both(self, mode: Mode) -> None:
        self.to_server.mode = self.to_client.mode = mode

    def heal(self) -> None:
        """Forward again, and take new connections again."""
        self._is_refusing = False
        for way in (self.to_server, self.to_client):
            way.delay_s, way.cut_after = 0.0, None
        self.both(Mode.PASS)

    def cut(self) -> None:
        """End every connection at once; what is under way is dropped."""
        for writer in list(self._writers):
            writer.transport.abort()

    def reset(self) -> None:
        """End every connection with RST on both sides."""
        for writer in list(self._writers):
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.cut()

    def refuse(self) -> None:
        """Cut, and end new connections as soon as they come."""
        self._is_refusing = True
        self.cut()

    def half_open(self) -> None:
        """The server is gone and nobody tells the client: its bytes vanish, none come back."""
        self.both(Mode.SWALLOW)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            if not self._is_refusing:
                await self._serve(reader, writer)
        except asyncio.CancelledError:
            pass  # stop() cancels us; asyncio's own callback would log it
        finally:
            self._running.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            self._writers |= {writer, far_writer}
            try:
                async with asyncio.TaskGroup() as group:
                    there = group.create_task(self._pump(reader, far_writer, self.to_server))
                    back = group.create_task(self._pump(far_reader, writer, self.to_client))
                    await asyncio.wait([there, back], return_when=asyncio.FIRST_COMPLETED)
                    there.cancel()
                    back.cancel()
            finally:
                self._writers -= {writer, far_writer}
                far_writer.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Direction
    ) -> None:
        with suppress(OSError):
            while True:
                await way.ready()
                data = await reader.read(PIECE_BYTES)
                if not data:
                    return
                if way.delay_s:
                    await asyncio.sleep(way.delay_s)
                await way.ready()
                if way.mode in {Mode.PASS, Mode.TRICKLE}:
                    await way.pass_on(way.allowed(data), writer)
                if way.cut_after == 0:
                    way.cut_after = None
                    self.cut()


@asynccontextmanager
async def running_proxy(url: str) -> AsyncIterator[tuple[FaultProxy, str]]:
    """A proxy in front of the server of a URL, and the URL that leads through it."""
    parts = urlsplit(url)
    proxy = FaultProxy(url)
    await proxy.start()
    try:
        userinfo = parts.netloc.rpartition("@")[0]
        netloc = f"{userinfo}@127.0.0.1:{proxy.port}" if userinfo else f"127.0.0.1:{proxy.port}"
        yield proxy, urlunsplit(parts._replace(netloc=netloc))
    finally:
        await proxy.stop()
