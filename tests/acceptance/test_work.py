"""Workers are killed with streams open: their holds end by themselves, at a fair price."""

import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.farebox import (
    PEPPER,
    Done,
    Running,
    farebox,
    running_demo,
    running_serve,
    running_work,
)
from tests.support.gateway import eventually
from tests.support.rawclient import chat, connect

STREAMS, WORDS, SEEN = 5, 400, 30
# A dead worker is known by its leases here: four times the grace, so within some seconds.
CONFIG = f"""
[keys]
mode = "test"
[till]
hold_lease_s = 1
renew_every_s = 0.2
[work]
every_s = 0.2
sweep_grace_s = 0.5
takeover_after_s = 0.3
[providers.slow]
kind = "echo"
chunk_delay_ms = 30
output_tokens = {WORDS}
[models.slow]
routes = [{{ provider = "slow" }}]
price = {{ input_usd_per_mtok = "1", output_usd_per_mtok = "4" }}
output_tokens_max = {WORDS}
"""
LONG = {
    "model": "slow",
    "messages": [{"role": "user", "content": "word " * WORDS}],
    "stream": True,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "short.toml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def stores(book_url: str, till_url: str, folder: Path) -> dict[str, str]:
    return {
        "FAREBOX_DATABASE_URL": book_url,
        "FAREBOX_BOOK__ROLES": "shared",
        "FAREBOX_TILL_URL": till_url,
        "FAREBOX_KEYS__PEPPER": PEPPER,
        "FAREBOX_CONFIG": str(folder / "short.toml"),
    }


@asynccontextmanager
async def open_streams(gateway: Running, key: str) -> AsyncIterator[None]:
    """Streams of which something was delivered."""
    async with AsyncExitStack() as stack:
        for _ in range(STREAMS):
            conn = await stack.enter_async_context(connect(gateway.base_url, deadline=30))
            await conn.send(chat(key, LONG))
            assert (await conn.head()).status == 200
            seen = 0
            async for _piece in conn.body():
                seen += 1
                if seen == SEEN:
                    break
        yield


class Cli:
    """Commands beside what runs."""

    def __init__(self, folder: Path, *args: str, **env: str) -> None:
        self.folder, self.args, self.env = folder, args, env

    async def __call__(self, *args: str) -> Done:
        return await farebox(*args, *self.args, cwd=self.folder, **self.env)

    async def receipts(self, count: int) -> list[dict[str, Any]]:
        """All of them, as soon as there are that many and nothing is open any more."""

        async def enough() -> list[dict[str, Any]] | None:
            rows: list[dict[str, Any]] = (await self("receipts", "list", "--json")).json
            return rows if len(rows) >= count else None

        rows: list[dict[str, Any]] = await eventually(enough, 60)

        async def at_rest() -> Done | None:
            audit = await self("audit", "--at-rest")
            return audit if audit.status == 0 else None

        await eventually(at_rest, 30)
        assert len(rows) == count
        return rows

    async def key(self) -> str:
        account = (await self("accounts", "create", "--json")).json["billing_account_id"]
        await self("credits", "grant", account, "1000")
        made = await self("keys", "create", "--account", account, "--name", "k", "--json")
        return str(made.json["api_key"])


def check_recovered(receipts: list[dict[str, Any]]) -> None:
    """Each was charged for what was written down, and for no more than it could have delivered."""
    assert {receipt["outcome"] for receipt in receipts} == {"recovered"}
    assert all(0 < receipt["output_tokens"] < WORDS for receipt in receipts)
    assert all(0 < receipt["price_nanos"] < receipt["hold_nanos"] for receipt in receipts)


async def test_streams_of_a_killed_worker_are_charged_for_what_was_delivered(folder: Path) -> None:
    with running_demo(folder, "--config", "short.toml") as demo:
        (worker,) = demo.facts["pids"]["workers"]
        async with open_streams(demo, demo.api_key):
            os.kill(worker, signal.SIGKILL)
        cli = Cli(folder, "--data-dir", "data")
        receipts = await cli.receipts(STREAMS)
        log = demo.log

    check_recovered(receipts)
    assert log.count('"event":"hold.swept"') == STREAMS
    assert '"event":"ledger.drift"' not in log


async def test_a_process_of_its_own_does_the_work(folder: Path, stores: dict[str, str]) -> None:
    cli = Cli(folder, **stores)
    key = await cli.key()
    with running_serve(folder, **stores, FAREBOX_WORK__IN_SERVE="false") as server:
        async with open_streams(server, key):
            os.kill(server.facts["workers"][0], signal.SIGKILL)
        status = (await cli("till", "status", "--json")).json
        with running_work(folder / "work", **stores):
            receipts = await cli.receipts(STREAMS)

    # Nobody had touched them before.
    assert status["holds"] == STREAMS
    check_recovered(receipts)


@pytest.fixture
def two(folder: Path, stores: dict[str, str]) -> Iterator[list[tuple[Path, Any]]]:
    """Two processes that work, or stand by: their folders, and they themselves."""
    folders = [folder / "one", folder / "two"]
    with (
        running_work(folders[0], **stores) as first,
        running_work(folders[1], **stores) as second,
    ):
        yield list(zip(folders, (first, second), strict=True))


def leaders(two: list[tuple[Path, Any]]) -> list[int]:
    """Which of them began to work."""
    said = [(folder / "stderr").read_text() for folder, _ in two]
    return [at for at, text in enumerate(said) if '"event":"work.began"' in text]


async def test_another_takes_over_when_the_one_that_works_is_killed(
    folder: Path, stores: dict[str, str], two: list[tuple[Path, Any]]
) -> None:
    cli = Cli(folder, **stores)
    key = await cli.key()

    async def led() -> list[int] | None:
        return leaders(two) or None

    (leader,) = await eventually(led)
    with running_serve(folder, **stores, FAREBOX_WORK__IN_SERVE="false") as server:
        async with open_streams(server, key):
            two[leader][1].kill()
            os.kill(server.facts["workers"][0], signal.SIGKILL)
        receipts = await cli.receipts(STREAMS)

    check_recovered(receipts)
    assert set(leaders(two)) == {0, 1}
