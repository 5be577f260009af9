"""Starting, stopping and dying: nobody is cut off, nothing is lost, nothing is left running."""

import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.farebox import Running, farebox, is_gone, running_demo
from tests.support.gateway import eventually
from tests.support.rawclient import chat, connect, exchange

LONG_WORDS = 100
PACE_MS = 40
CONFIG = f"""
[keys]
mode = "test"
[metrics]
open = true
[providers.slow]
kind = "echo"
chunk_delay_ms = {PACE_MS}
output_tokens = {LONG_WORDS}
[models.slow]
routes = [{{ provider = "slow" }}]
price = {{ input_usd_per_mtok = "1", output_usd_per_mtok = "4" }}
output_tokens_max = 100
"""
HELLO = {"model": "slow", "messages": [{"role": "user", "content": "hello"}]}
# Some seconds: only a signal ends it in time.
LONG = {"model": "slow", "messages": [{"role": "user", "content": "word " * LONG_WORDS}]}
PRICE_NANOS = 2 * 4000
"""Of one token of output, with the markup."""


@pytest.fixture(scope="module")
def first_start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder in which a demo ran and was stopped, and what it said."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "slow.toml").write_text(CONFIG)
    with running_demo(folder, "--config", "slow.toml") as demo:
        pass
    assert demo.process.returncode == 0
    return folder, demo.facts


@pytest.fixture
def folder(first_start: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of that folder, for one test."""
    place = tmp_path / "copy"
    shutil.copytree(first_start[0], place)
    return place


@pytest.fixture
def demo(folder: Path) -> Iterator[Running]:
    with running_demo(folder, "--config", "slow.toml") as demo:
        yield demo


@asynccontextmanager
async def open_stream(demo: Running, payload: dict[str, Any]) -> AsyncIterator[AsyncIterator[str]]:
    """The text of a stream from where its first words have arrived."""
    async with connect(demo.base_url, deadline=20) as conn:
        await conn.send(chat(demo.api_key, {**payload, "stream": True}))
        head = await conn.head()
        assert head.status == 200
        text = (piece.data.decode() async for piece in conn.body())
        await until(text, "said:")
        yield text


async def until(text: AsyncIterator[str], mark: str) -> str:
    """What comes up to and with mark, or up to a broken end."""
    said = ""
    async for piece in text:
        said += piece
        if mark in said:
            break
    return said


async def draining(demo: Running) -> None:
    """Wait until the gateway lets nobody in any more."""

    async def refuses() -> bool | None:
        try:
            await exchange(demo.base_url, chat(demo.api_key, HELLO))
        except ConnectionRefusedError:
            return True
        return None

    await eventually(refuses)


def family(demo: Running) -> list[int]:
    """Every process that the demo started, and itself."""
    children = psutil.Process(demo.process.pid).children(recursive=True)
    return [demo.process.pid, *(child.pid for child in children)]


async def all_gone(pids: list[int], timeout_s: float = 15) -> None:
    async def gone() -> bool | None:
        return True if all(map(is_gone, pids)) else None

    await eventually(gone, timeout_s)


async def receipts_and_audit(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """What the book says afterwards, by commands that start the stores by themselves."""
    listed = await farebox("receipts", "list", "--json", "--data-dir", "data", cwd=folder)
    audit = await farebox("audit", "--data-dir", "data", cwd=folder)
    assert audit.status == 0, audit.out + audit.err
    return listed.json, audit.out


async def test_a_second_start_keeps_the_key_and_the_money(
    first_start: tuple[Path, dict[str, Any]], demo: Running
) -> None:
    folder, facts = first_start
    answer = await exchange(demo.base_url, chat(facts["api_key"], HELLO))
    shown = await demo.cli("accounts", "show", facts["account_id"], "--json")

    same = ("api_key", "operator_key", "account_id")
    assert [demo.facts[name] for name in same] == [facts[name] for name in same]
    assert answer.status == 200
    assert shown.json["balance_nanos"] == 10_000_000_000 - shown.json["charged_nanos"]
    # The cluster was not built again: that is what makes the second start faster.
    version = "data/postgres/data/PG_VERSION"
    assert (demo.cwd / version).stat().st_mtime_ns == (folder / version).stat().st_mtime_ns


async def test_a_stop_signal_lets_the_stream_finish(demo: Running, folder: Path) -> None:
    pids = family(demo)
    async with open_stream(demo, HELLO) as text:
        demo.process.send_signal(signal.SIGTERM)
        await draining(demo)
        rest = await until(text, "[DONE]")

    assert rest.endswith("data: [DONE]\n\n")
    assert await demo.exit_status() == 0
    await all_gone(pids)
    assert not (folder / "ready.json").exists()
    assert (folder / "stderr").read_text() == "stopping: running requests finish first\n"
    assert '"level":"error"' not in demo.log
    receipts, audit = await receipts_and_audit(folder)
    assert receipts[-1]["outcome"] == "complete"
    assert receipts[-1]["price_nanos"] == 2 * (1000 + 13 * 4000)
    assert "open holds" not in audit


async def test_a_second_signal_settles_what_came_and_ends_at_once(
    demo: Running, folder: Path
) -> None:
    pids = family(demo)
    async with open_stream(demo, LONG):
        demo.process.send_signal(signal.SIGINT)
        await draining(demo)
        demo.process.send_signal(signal.SIGINT)
        assert await demo.exit_status() == 0

    await all_gone(pids)
    assert '"level":"error"' not in demo.log
    receipts, audit = await receipts_and_audit(folder)
    receipt = receipts[-1]
    assert receipt["outcome"] != "complete"
    assert 0 < receipt["output_tokens"] < LONG_WORDS
    assert receipt["price_nanos"] >= receipt["output_tokens"] * PRICE_NANOS
    assert "open holds" not in audit


async def test_a_stream_that_outlasts_the_drain_is_settled_too(folder: Path) -> None:
    patience = {"FAREBOX_SERVER__DRAIN_TIMEOUT_S": "1"}
    with running_demo(folder, "--config", "slow.toml", **patience) as demo:
        async with open_stream(demo, LONG):
            demo.process.send_signal(signal.SIGTERM)
            assert await demo.exit_status() == 0

    receipts, audit = await receipts_and_audit(folder)
    assert [receipt["outcome"] != "complete" for receipt in receipts] == [True]
    assert 0 < receipts[0]["output_tokens"] < LONG_WORDS
    assert "open holds" not in audit


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux: death signals")
async def test_a_killed_demo_leaves_nothing_running_and_starts_again(
    demo: Running, folder: Path
) -> None:
    pids = family(demo)
    whole = await exchange(demo.base_url, chat(demo.api_key, HELLO))
    async with open_stream(demo, HELLO):
        demo.process.kill()
        demo.process.wait()
        await all_gone(pids)

    assert whole.status == 200
    with running_demo(folder, "--config", "slow.toml") as second:
        again = await exchange(second.base_url, chat(second.api_key, HELLO))

        async def three() -> list[str] | None:
            listed = await second.cli("receipts", "list", "--json")
            found = sorted(receipt["outcome"] for receipt in listed.json)
            return found if len(found) == 3 else None

        outcomes = await eventually(three, 20)
        audit = await second.cli("audit")
    assert again.status == 200
    assert audit.status == 0, audit.out
    # The worker outlived its stores for long enough to leave the stream's receipt in its spool: cut
    # off, or whole when the stream was quicker than the news that the stores are gone.
    assert outcomes.count("complete") >= 2
    assert set(outcomes) <= {"client_left", "complete"}


async def test_a_killed_worker_is_replaced(demo: Running) -> None:
    (worker,) = demo.facts["pids"]["workers"]
    os.kill(worker, signal.SIGKILL)
    await all_gone([worker])
    # The socket stays open meanwhile: nobody is refused, the call waits for the next worker.
    answer = await exchange(demo.base_url, chat(demo.api_key, HELLO), deadline=20)

    assert answer.status == 200
    assert '"event":"worker.died"' in demo.log
