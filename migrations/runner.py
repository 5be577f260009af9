"""Apply the numbered SQL files of this package, each once, each in its own transaction.

Forward-only: an applied file never changes (its checksum is recorded and compared). Several
processes may start at once: an advisory lock lets one of them work and the others find nothing
left to do.
Failure: a file that fails leaves the schema as it was before that file; nothing is skipped.
"""

import hashlib
import re
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

import asyncpg

# Any constant will do; it must only differ from other advisory locks of this database.
ADVISORY_LOCK = 0x6661726562
LOCK_TIMEOUT = "SET lock_timeout = '5s'"
# A statement that row level security would keep from some of the rows fails instead of doing less.
ROW_SECURITY = "SET row_security = off"
FILE_NAME = re.compile(r"^(\d{4})_[a-z0-9_]+\.sql$")


Connection = asyncpg.Connection | asyncpg.pool.PoolConnectionProxy


class MigrationError(Exception):
    """The schema cannot be brought to this release's state."""


@dataclass(frozen=True)
class Migration:
    number: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def read_migrations(folder: Traversable | None = None) -> list[Migration]:
    """All migrations in order. Raises MigrationError when numbers repeat or leave a gap."""
    found = []
    for entry in (folder or resources.files("migrations") / "sql").iterdir():
        if match := FILE_NAME.match(entry.name):
            found.append(Migration(int(match[1]), entry.name, entry.read_text("utf-8")))
    found.sort(key=lambda m: m.number)
    if [m.number for m in found] != list(range(1, len(found) + 1)):
        raise MigrationError(f"migration numbers repeat or leave a gap: {[m.name for m in found]}")
    return found


CREATE_HISTORY = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    number      integer PRIMARY KEY,
    name        text NOT NULL,
    checksum    text NOT NULL,
    applied_at  timestamptz NOT NULL DEFAULT now()
)
"""
SELECT_HISTORY = "SELECT number, name, checksum FROM schema_migrations ORDER BY number"
INSERT_HISTORY = "INSERT INTO schema_migrations (number, name, checksum) VALUES ($1, $2, $3)"
LOCK = "SELECT pg_advisory_lock($1)"
HAS_HISTORY = "SELECT to_regclass('schema_migrations') IS NOT NULL"


async def migrate(url: str, migrations: list[Migration] | None = None) -> list[str]:
    """Bring the database at url up to date; returns the names applied now (none: a no-op).

    Raises MigrationError when an applied file was changed since, when the database was migrated
    by a newer release, or when Postgres refuses something; OSError when it cannot be reached.
    """
    wanted = read_migrations() if migrations is None else migrations
    try:
        conn = await asyncpg.connect(url, timeout=10, command_timeout=300)
        try:
            # The end of the connection gives the lock back, however it ends.
            await conn.execute(LOCK, ADVISORY_LOCK)
            return await _apply_missing(conn, wanted)
        finally:
            await conn.close(timeout=10)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as exc:
        raise MigrationError(f"the database cannot be migrated: {exc}") from exc


async def pending(conn: Connection) -> list[str]:
    """Names of migrations that this release has and the database does not."""
    wanted = read_migrations()
    if not await conn.fetchval(HAS_HISTORY):
        return [m.name for m in wanted]
    try:
        applied = await conn.fetch(SELECT_HISTORY)
    except asyncpg.InsufficientPrivilegeError as exc:
        raise MigrationError(
            "this login may not see what was applied: it is no member of farebox_worker, "
            "or the database is behind this release (then run farebox migrate)"
        ) from exc
    return [m.name for m in _missing(wanted, applied)]


def _missing(wanted: list[Migration], applied: list[asyncpg.Record]) -> list[Migration]:
    if len(applied) > len(wanted):
        raise MigrationError(
            f"the database has {applied[-1]['name']}, which this release does not know: "
            "run the newer release"
        )
    for migration, row in zip(wanted, applied, strict=False):
        if row["number"] != migration.number:
            raise MigrationError(f"the database's history has no {migration.name}, but later ones")
        if row["checksum"] != migration.checksum:
            raise MigrationError(
                f"{migration.name} was changed after it was applied: write a new file instead"
            )
    return wanted[len(applied) :]


async def _apply_missing(conn: asyncpg.Connection, wanted: list[Migration]) -> list[str]:
    await conn.execute(CREATE_HISTORY)
    missing = _missing(wanted, await conn.fetch(SELECT_HISTORY))
    # Waiting for a lock would queue every other query behind us: give up and be run again.
    await conn.execute(LOCK_TIMEOUT)
    await conn.execute(ROW_SECURITY)
    for migration in missing:
        try:
            async with conn.transaction():
                await conn.execute(migration.sql)
                row = (migration.number, migration.name, migration.checksum)
                await conn.execute(INSERT_HISTORY, *row)
        except asyncpg.PostgresError as exc:
            raise MigrationError(
                f"{migration.name} failed, nothing of it is applied: {exc}"
            ) from exc
    return [m.name for m in missing]
