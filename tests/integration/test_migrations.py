"""Migrations: each once, in order, all or nothing, and never by two at a time."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from migrations.runner import (
    ADVISORY_LOCK,
    Migration,
    MigrationError,
    migrate,
    pending,
    read_migrations,
)

ONE = Migration(1, "0001_one.sql", "CREATE TABLE one (id integer PRIMARY KEY)")
TWO = Migration(2, "0002_two.sql", "CREATE TABLE two (id integer); INSERT INTO two VALUES (1)")
BROKEN = Migration(3, "0003_broken.sql", "CREATE TABLE three (id integer); SELECT nothing_here")


@pytest.fixture
async def empty_url(postgres_url: str, request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """A database without any table."""
    name = f"m_{abs(hash(request.node.nodeid)):x}"
    admin = await asyncpg.connect(postgres_url)
    try:
        await admin.execute(f"CREATE DATABASE {name}")
        yield postgres_url.rsplit("/", 1)[0] + f"/{name}"
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await admin.close()


async def tables(url: str) -> set[str]:
    conn = await asyncpg.connect(url)
    try:
        rows = await conn.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        return {row["tablename"] for row in rows}
    finally:
        await conn.close()


async def test_a_fresh_database_gets_everything_once(empty_url: str) -> None:
    conn = await asyncpg.connect(empty_url)
    before = await pending(conn)
    first = await migrate(empty_url)
    after = await pending(conn)
    history = await conn.fetch("SELECT * FROM schema_migrations ORDER BY number")
    again = await migrate(empty_url)
    same = await conn.fetch("SELECT * FROM schema_migrations ORDER BY number")
    await conn.close()

    assert before == first == [m.name for m in read_migrations()]
    assert after == again == []
    assert history == same
    assert {"billing_accounts", "credit_ledger", "charge_receipts", "till_epoch"} <= await tables(
        empty_url
    )


async def test_only_what_is_missing_is_applied(empty_url: str) -> None:
    assert await migrate(empty_url, [ONE]) == ["0001_one.sql"]
    assert await migrate(empty_url, [ONE, TWO]) == ["0002_two.sql"]
    assert await migrate(empty_url, [ONE, TWO]) == []


async def test_a_file_changed_after_it_was_applied_is_refused(empty_url: str) -> None:
    await migrate(empty_url, [ONE])
    changed = Migration(1, ONE.name, ONE.sql + " -- changed")

    with pytest.raises(MigrationError, match=r"0001_one\.sql was changed after it was applied"):
        await migrate(empty_url, [changed, TWO])

    assert "two" not in await tables(empty_url)


async def test_a_database_of_a_newer_release_is_refused(empty_url: str) -> None:
    await migrate(empty_url, [ONE, TWO])

    with pytest.raises(MigrationError, match=r"has 0002_two\.sql, which this release does not"):
        await migrate(empty_url, [ONE])


async def test_a_history_with_a_hole_is_refused(empty_url: str) -> None:
    await migrate(empty_url, [ONE, TWO])
    conn = await asyncpg.connect(empty_url)
    await conn.execute("DELETE FROM schema_migrations WHERE number = 1")
    await conn.close()

    with pytest.raises(MigrationError, match=r"no 0001_one\.sql, but later ones"):
        await migrate(empty_url, [ONE, TWO])


async def test_a_failing_file_leaves_nothing_and_the_ones_before_it_stay(empty_url: str) -> None:
    with pytest.raises(MigrationError, match=r"0003_broken\.sql failed, nothing of it is applied"):
        await migrate(empty_url, [ONE, TWO, BROKEN])

    assert await tables(empty_url) == {"schema_migrations", "one", "two"}
    assert await migrate(empty_url, [ONE, TWO]) == []


async def test_several_migrators_at_once_apply_everything_once(empty_url: str) -> None:
    applied = await asyncio.gather(*(migrate(empty_url) for _ in range(5)))

    assert sorted(filter(None, applied)) == [[m.name for m in read_migrations()]]


async def test_a_migrator_that_died_holds_nobody_up(empty_url: str) -> None:
    dead = await asyncpg.connect(empty_url)
    await dead.execute("SELECT pg_advisory_lock($1)", ADVISORY_LOCK)
    waiting = asyncio.ensure_future(migrate(empty_url, [ONE]))
    watcher = await asyncpg.connect(empty_url)
    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    async with asyncio.timeout(10):
        while not await watcher.fetchval(query):
            assert not waiting.done()
    dead.terminate()

    assert await waiting == ["0001_one.sql"]
    await watcher.close()


async def test_a_locked_table_ends_the_migration_instead_of_all_traffic(empty_url: str) -> None:
    await migrate(empty_url, [ONE])
    holder = await asyncpg.connect(empty_url)
    change = Migration(
        2, "0002_change.sql", "SET lock_timeout = '50ms'; ALTER TABLE one ADD COLUMN more text"
    )
    async with holder.transaction():
        await holder.execute("LOCK TABLE one IN ACCESS SHARE MODE")
        with pytest.raises(MigrationError, match="lock timeout"):
            await migrate(empty_url, [ONE, change])
    await holder.close()

    assert await migrate(empty_url, [ONE, change]) == ["0002_change.sql"]


async def test_an_unreachable_or_refusing_database_is_said_plainly(empty_url: str) -> None:
    with pytest.raises(MigrationError, match="cannot be migrated"):
        await migrate(empty_url.rsplit("/", 1)[0] + "/no_such_database", [ONE])
    with pytest.raises(OSError, match="onnect"):
        await migrate("postgresql://127.0.0.1:1/none", [ONE])


@pytest.mark.parametrize(
    "names",
    [["0002_b.sql"], ["0001_a.sql", "0003_c.sql"], ["0001_a.sql", "0001_b.sql"]],
)
def test_numbers_that_repeat_or_leave_a_gap_are_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text("SELECT 1")

    with pytest.raises(MigrationError, match="repeat or leave a gap"):
        read_migrations(tmp_path)


def test_files_of_another_kind_are_no_migrations(tmp_path: Path) -> None:
    for name in ("0001_a.sql", "0002_b.sql.orig", "2_c.sql", "README.md", "0002_B.sql"):
        (tmp_path / name).write_text("SELECT 1")

    assert [m.name for m in read_migrations(tmp_path)] == ["0001_a.sql"]
