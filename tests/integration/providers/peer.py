"""A provider made of bytes: it sends exactly what the test says, in these pieces."""

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum, auto

from gateway.providers.http import HttpClient
from gateway.providers.http_reply import HttpReply

WAIT_S = 10.0
# Turns of the loop in which the other end, on the same loop, reads what was just sent.
TURNS = 3


class Do(Enum):
    """What a script may do besides sending."""

    CLOSE = auto()
    """FIN (over TLS: after a proper goodbye)."""
    CUT = auto()
    """FIN, over TLS too."""
    RESET = auto()
    HOLD = auto()
    """Nothing more until the client has left."""


Step = bytes | Do | asyncio.Event


@dataclass
class Asked:
    """One request as it came."""

    head: bytes
    body: bytes
    connection: int


@dataclass
class Peer:
    """Plays `steps` for each request, or, when there are `scripts`, the next of these."""

    steps: tuple[Step, ...] = ()
    scripts: list[tuple[Step, ...]] = field(default_factory=list)
    make: Callable[[Asked], bytes] | None = None
    reads_body: bool = True
    greeting: bytes = b""
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0
    left: int = 0
    port: int = 0
    scheme: str = "http"
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def url(self, host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}/v1/chat/completions"

    def says(self, *steps: Step) -> None:
        self.steps = steps

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        self.writers.append(writer)
        sock = writer.get_extra_info("socket")
        try:
            if self.greeting:
                writer.write(self.greeting)
            while True:
                asked = await self._read(reader, number)
                self.asked.append(asked)
                steps = self.scripts.pop(0) if self.scripts else self.steps
                if self.make is not None:
                    steps = (self.make(asked),)
                for step in steps:
                    await self._play(step, reader, writer, sock)
        except (ConnectionError, asyncio.IncompleteReadError, _Ended):
            pass
        except ssl.SSLError:
            pass
        finally:
            self.left += 1
            writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader, number: int) -> Asked:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.rpartition(b"content-length: ")[2])
        body = await reader.readexactly(length) if self.reads_body else b""
        return Asked(head, body, number)

    async def _play(
        self,
        step: Step,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        sock: socket.socket,
    ) -> None:
        if isinstance(step, bytes):
            writer.write(step)
            await writer.drain()
            await turns()
        elif isinstance(step, asyncio.Event):
            await step.wait()
        elif step is Do.HOLD:
            await reader.read()
            raise _Ended
        else:
            if step is Do.RESET:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if step is Do.CLOSE:
                writer.close()
                await writer.wait_closed()
            raise _Ended


class _Ended(Exception):
    """The script ended the connection."""


async def turns(count: int = TURNS) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@asynccontextmanager
async def running_peer(tls: ssl.SSLContext | None = None) -> AsyncIterator[Peer]:
    peer = Peer(scheme="http" if tls is None else "https")
    server = await asyncio.start_server(peer.serve, "127.0.0.1", 0, ssl=tls, limit=1 << 20)
    peer.port = server.sockets[0].getsockname()[1]
    try:
        yield peer
    finally:
        server.close()
        for writer in peer.writers:
            writer.transport.abort()
        await until(lambda: peer.left == peer.connections)
        await server.wait_closed()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def post(client: HttpClient, peer: Peer, body: bytes = b"{}") -> HttpReply:
    async with asyncio.timeout(WAIT_S):
        return await client.post(client.target(peer.url(), {"x-key": "secret"}), body)


async def read_all(reply: HttpReply) -> bytes:
    body = b""
    async with asyncio.timeout(WAIT_S):
        while piece := await reply.read():
            body += piece
    return body


async def ask(client: HttpClient, peer: Peer, body: bytes = b"{}") -> bytes:
    """The body of the answer to one request."""
    reply = await post(client, peer, body)
    try:
        return await read_all(reply)
    finally:
        reply.close()


def head(*headers: bytes, status: bytes = b"200 OK", version: bytes = b"1.1") -> bytes:
    return b"HTTP/%b %b\r\n" % (version, status) + b"".join(h + b"\r\n" for h in headers) + b"\r\n"


def sized(body: bytes, *headers: bytes, status: bytes = b"200 OK") -> bytes:
    return head(*headers, b"content-length: %d" % len(body), status=status) + body


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


CHUNKED = head(b"transfer-encoding: chunked")
END = b"0\r\n\r\n"
