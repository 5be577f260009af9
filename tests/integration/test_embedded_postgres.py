"""Embedded Postgres: real programs, real folders. All tests share one cluster: initdb is slow."""

import asyncio
import os
import signal
import socket
import stat
import time
from pathlib import Path

import asyncpg
import psutil
import pytest

from gateway.embedded import server
from gateway.embedded.errors import StoreStartFailed
from gateway.embedded.postgres import EmbeddedPostgres
from gateway.embedded.server import until

FAST = {"fsync": "off"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster") / "postgres"


def processes_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join([process.cwd(), *process.cmdline()]):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            continue
    return found


async def ask(url: str, query: str) -> object:
    connection = await asyncpg.connect(url, ssl=False)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def test_rows_survive_a_restart_without_a_second_initdb(root: Path) -> None:
    postgres = EmbeddedPostgres(root, settings=FAST)
    await postgres.start()
    await ask(postgres.url, "CREATE TABLE kept AS SELECT 42 AS n")
    cluster = await ask(postgres.url, "SELECT system_identifier::text FROM pg_control_system()")
    await postgres.stop()
    assert processes_in(root) == []

    await postgres.start()

    assert await ask(postgres.url, "SELECT n FROM kept") == 42
    again = await ask(postgres.url, "SELECT system_identifier::text FROM pg_control_system()")
    assert again == cluster
    await postgres.stop()


async def test_only_the_password_opens_it_and_only_on_loopback(root: Path) -> None:
    postgres = EmbeddedPostgres(root, settings=FAST)
    await postgres.start()

    with pytest.raises(asyncpg.InvalidPasswordError):
        await ask(postgres.url.replace(postgres.password, "wrong"), "SELECT 1")
    listening = {c.laddr.ip for c in psutil.Process(postgres.pid).net_connections("tcp")}
    assert listening == {"127.0.0.1"}
    hba = (root / "data" / "pg_hba.conf").read_text().splitlines()
    rules = [line.split()[-1] for line in hba if line.strip() and not line.startswith("#")]
    assert set(rules) == {"scram-sha-256"}
    assert stat.S_IMODE((root / "password").stat().st_mode) == 0o600
    assert stat.S_IMODE((root / "data").stat().st_mode) == 0o700
    await postgres.stop()


async def test_cluster_has_checksums_and_the_builtin_locale(root: Path) -> None:
    postgres = EmbeddedPostgres(root, settings={**FAST, "work_mem": "5MB"})
    await postgres.start()

    assert await ask(postgres.url, "SHOW data_checksums") == "on"
    assert await ask(postgres.url, "SHOW unix_socket_directories") == ""
    assert await ask(postgres.url, "SHOW work_mem") == "5MB"
    provider = "SELECT datlocprovider::text || datlocale FROM pg_database WHERE datname = 'farebox'"
    assert await ask(postgres.url, provider) == "bC.UTF-8"
    await postgres.stop()


async def test_killed_server_starts_again_though_its_pid_now_belongs_to_another(root: Path) -> None:
    postgres = EmbeddedPostgres(root, settings=FAST)
    await postgres.start()
    await ask(postgres.url, "CREATE TABLE crash AS SELECT 7 AS n")
    os.kill(postgres.pid, signal.SIGKILL)
    await postgres.stop()
    stale = root / "data" / "postmaster.pid"
    lines = stale.read_text().splitlines()
    stale.write_text("\n".join([str(os.getppid()), *lines[1:]]) + "\n")

    await postgres.start()

    assert await ask(postgres.url, "SELECT n FROM crash") == 7
    await postgres.stop()


async def test_second_server_on_the_folder_waits_until_the_first_has_gone(root: Path) -> None:
    first, second = (EmbeddedPostgres(root, settings=FAST) for _ in range(2))
    await first.start()
    start = asyncio.ensure_future(second.start())
    done, _ = await asyncio.wait({start}, timeout=0.3)
    assert not done

    await first.stop()
    await start

    assert await ask(second.url, "SELECT 1") == 1
    await second.stop()


async def test_taken_port_is_given_up_for_another(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        ports = iter([taken, server.free_port()])
        monkeypatch.setattr(server, "free_port", lambda: next(ports))
        postgres = EmbeddedPostgres(root, settings=FAST)

        await postgres.start()

        assert postgres.port != taken
        await postgres.stop()


async def test_refused_setting_fails_at_once_with_the_reason_from_the_log(root: Path) -> None:
    postgres = EmbeddedPostgres(root, settings={"shared_buffers": "plenty"})
    began = time.monotonic()

    with pytest.raises(StoreStartFailed, match="invalid value for parameter") as failure:
        await postgres.start()

    assert failure.value.name == "postgres"
    assert time.monotonic() - began < 10
    assert processes_in(root) == []


async def test_initdb_cut_short_is_thrown_away(tmp_path: Path) -> None:
    postgres = EmbeddedPostgres(tmp_path, settings=FAST)
    start = asyncio.ensure_future(postgres.start())
    async with asyncio.timeout(20):
        await until((tmp_path / "init" / "data" / "PG_VERSION").exists)
    start.cancel()
    await asyncio.wait({start})
    assert start.cancelled()
    async with asyncio.timeout(20):
        await until(lambda: not processes_in(tmp_path))
    assert not (tmp_path / "data").exists()
    (tmp_path / "init" / "data").mkdir(parents=True, exist_ok=True)
    (tmp_path / "init" / "data" / "half").write_text("written")

    await postgres.start()

    assert await ask(postgres.url, "SELECT 1") == 1
    assert not (tmp_path / "init").exists()
    await postgres.stop()
