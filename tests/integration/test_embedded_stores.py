"""Both stores together: who owns them, who attaches, and that nothing outlives the owner."""

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import psutil
import pytest
from redis.asyncio import Redis

from gateway.embedded.errors import (
    StoresInUse,
    StoresNotRunning,
    StoreStartFailed,
    StoreUnsupported,
)
from gateway.embedded.server import until
from gateway.embedded.stores import StoreUrls, open_stores

FAST = {"fsync": "off"}
REPO = Path(__file__).parents[2]
OWNER = """
import asyncio, pathlib, sys
from gateway.embedded.stores import open_stores

async def main():
    folder = pathlib.Path(sys.argv[1])
    async with open_stores(folder, own=True, book_settings={"fsync": "off"}) as urls:
        print(*urls.pids.values(), flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores") / "data"


@contextmanager
def owner_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A real parent. It gets its own session: no signal here may come from our terminal."""
    command = [sys.executable, "-W", "error", "-c", OWNER, str(folder)]
    with subprocess.Popen(
        command, cwd=REPO, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        try:
            yield parent
        finally:
            parent.kill()


async def pids_of(parent: subprocess.Popen[str]) -> list[int]:
    assert parent.stdout is not None
    line = await asyncio.wait_for(asyncio.to_thread(parent.stdout.readline), 30)
    return [int(pid) for pid in line.split()]


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def mentioning(text: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if text in " ".join([process.cwd(), *process.cmdline()]):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            continue
    return found


async def until_gone(*pids: int) -> None:
    async with asyncio.timeout(20):
        await until(lambda: not any(runs(pid) for pid in pids))


async def assert_both_answer(urls: StoreUrls) -> None:
    connection = await asyncpg.connect(urls.book_url, ssl=False)
    assert await connection.fetchval("SELECT current_database()") == "farebox"
    await connection.close()
    async with Redis.from_url(urls.till_url) as client:
        assert await client.ping()


async def test_owner_launches_both_and_stops_both(folder: Path) -> None:
    before = set(psutil.Process().children())
    async with open_stores(folder, own=True, book_settings=FAST) as urls:
        await assert_both_answer(urls)
        assert urls.embedded
        assert set(urls.pids) == {"postgres", "valkey"}
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        assert stat.S_IMODE((folder / "stores.json").stat().st_mode) == 0o600

    assert not any(runs(pid) for pid in urls.pids.values())
    assert not (folder / "stores.json").exists()
    assert set(psutil.Process().children()) == before  # those of the test run itself


async def test_no_password_is_in_any_argument_or_representation(folder: Path) -> None:
    async with open_stores(folder, book_settings=FAST) as urls:
        for name in urls.pids:
            password = (folder / name / "password").read_text()
            assert mentioning(password) == []
            assert password not in repr(urls)


async def test_second_command_attaches_and_leaves_the_servers_running(folder: Path) -> None:
    async with open_stores(folder, book_settings=FAST) as owned:
        async with open_stores(folder, may_launch=False) as attached:
            assert attached == owned
        await assert_both_answer(owned)


async def test_second_owner_is_refused_with_the_pid_of_the_first(folder: Path) -> None:
    with owner_process(folder) as parent:
        await pids_of(parent)

        with pytest.raises(StoresInUse) as refusal:
            async with open_stores(folder, own=True):
                pass

        assert refusal.value.pid == parent.pid
        assert refusal.value.data_dir == folder
        async with open_stores(folder) as urls:
            await assert_both_answer(urls)


async def test_attaching_waits_until_the_owner_serves(folder: Path) -> None:
    with owner_process(folder) as parent:
        async with asyncio.timeout(20):
            await until(lambda: (folder / "stores.lock").read_text() == str(parent.pid))

        async with open_stores(folder) as urls:
            await assert_both_answer(urls)

        assert list(urls.pids.values()) == await pids_of(parent)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of a parent's death")
async def test_dead_owner_takes_both_servers_along(folder: Path, name: str) -> None:
    with owner_process(folder) as parent:
        pids = await pids_of(parent)
        assert all(runs(pid) for pid in pids)

        parent.send_signal(getattr(signal, name))

        await until_gone(parent.pid, *pids)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of a parent's death")
async def test_owner_killed_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with owner_process(folder) as parent:
        async with asyncio.timeout(20):
            await until(lambda: bool(mentioning(str(folder / "postgres" / "init"))))

        parent.kill()

        async with asyncio.timeout(20):
            await until(lambda: not mentioning(str(folder)))


async def test_start_right_after_a_kill_waits_for_the_old_servers(folder: Path) -> None:
    with owner_process(folder) as parent:
        old = await pids_of(parent)
        parent.kill()
        parent.wait(10)

        async with open_stores(folder, own=True, book_settings=FAST) as urls:
            await assert_both_answer(urls)
            assert set(urls.pids.values()).isdisjoint(old)


async def test_stale_address_of_a_killed_owner_is_not_believed(folder: Path) -> None:
    gone = next(pid for pid in range(2**22, 1, -1) if not psutil.pid_exists(pid))
    stale = {"owner_pid": gone, "book_url": "x", "till_url": "y", "pids": {}}
    (folder / "stores.json").write_text(json.dumps(stale))

    with pytest.raises(StoresNotRunning):
        async with open_stores(folder, may_launch=False):
            pass
    async with open_stores(folder, book_settings=FAST) as urls:
        await assert_both_answer(urls)


async def test_failure_of_one_store_stops_the_other(tmp_path: Path) -> None:
    (tmp_path / "valkey").mkdir()
    (tmp_path / "valkey" / "data").write_text("a file where the folder should be")

    with pytest.raises(StoreStartFailed, match="valkey"):
        async with open_stores(tmp_path, book_settings=FAST):
            pass

    assert mentioning(str(tmp_path)) == []
    assert not (tmp_path / "stores.json").exists()


async def test_exception_of_the_caller_stops_both(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_stores(folder, book_settings=FAST):
            raise ZeroDivisionError

    assert mentioning(str(folder)) == []


async def test_cancelled_twice_still_stops_both(folder: Path) -> None:
    ready = asyncio.Event()

    async def serve() -> None:
        async with open_stores(folder, book_settings=FAST):
            ready.set()
            await asyncio.Event().wait()

    serving = asyncio.ensure_future(serve())
    await ready.wait()
    serving.cancel()
    await asyncio.sleep(0)
    serving.cancel()
    await asyncio.wait({serving})

    assert serving.cancelled()
    assert mentioning(str(folder)) == []


async def test_external_urls_are_used_as_they_are(tmp_path: Path) -> None:
    async with open_stores(tmp_path / "none", "postgresql://a/b", "redis://c") as urls:
        assert urls == StoreUrls("postgresql://a/b", "redis://c", {}, embedded=False)

    assert not (tmp_path / "none").exists()


async def test_one_external_url_leaves_the_other_store_embedded(folder: Path) -> None:
    async with open_stores(folder, "postgresql://a/b") as urls:
        assert urls.book_url == "postgresql://a/b"
        assert set(urls.pids) == {"valkey"}

        with pytest.raises(StoresInUse):
            async with open_stores(folder):
                pass


async def test_windows_is_pointed_to_wsl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.embedded.stores.sys.platform", "win32")

    with pytest.raises(StoreUnsupported, match="WSL"):
        async with open_stores(tmp_path):
            pass
