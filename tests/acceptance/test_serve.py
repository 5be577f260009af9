"""`farebox serve` against stores of somebody else's, and `farebox migrate`."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest

from gateway.affinity import allowed_cpus
from tests.conftest import database_url
from tests.support.farebox import PEPPER, Running, farebox, is_gone, running_serve
from tests.support.gateway import eventually
from tests.support.rawclient import Outcome, RawRequest, chat, connect, exchange

CONFIG = """
[keys]
mode = "test"
[metrics]
open = true
[providers.slow]
kind = "echo"
chunk_delay_ms = 20
[models.echo]
routes = [{ provider = "slow" }]
price = { input_usd_per_mtok = "1", output_usd_per_mtok = "4" }
output_tokens_max = 100
"""
REMOTE = """
[providers.one]
kind = "openai"
base_url = "https://one.test/v1"
[providers.two]
kind = "openai"
base_url = "https://two.test/v1"
[providers.local]
kind = "openai"
base_url = "http://127.0.0.1:1/v1"
"""
METRICS = RawRequest(method="GET", target="/metrics")
REQUESTS = 'farebox_http_requests_total{code="",route="/v1/chat/completions",status="200"}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.toml").write_text(CONFIG)
    # A project of the operator's own may well have a module of this name.
    (tmp_path / "config.py").write_text("raise SystemExit('not the right config')\n")
    return tmp_path


@pytest.fixture
def stores(book_url: str, till_url: str) -> dict[str, str]:
    return {
        "FAREBOX_DATABASE_URL": book_url,
        "FAREBOX_BOOK__ROLES": "shared",
        "FAREBOX_TILL_URL": till_url,
        "FAREBOX_KEYS__PEPPER": PEPPER,
        "FAREBOX_CONFIG": "own.toml",
    }


@pytest.fixture
async def empty_url(template_url: str) -> AsyncIterator[str]:
    """A database without any table."""
    admin = await asyncpg.connect(template_url)
    try:
        await admin.execute("CREATE DATABASE empty")
        yield database_url(template_url, "empty")
        await admin.execute("DROP DATABASE empty WITH (FORCE)")
    finally:
        await admin.close()


async def paying_key(folder: Path, stores: dict[str, str]) -> str:
    created = await farebox("accounts", "create", "--json", cwd=folder, **stores)
    account = created.json["billing_account_id"]
    _, key = await asyncio.gather(
        farebox("credits", "grant", account, "1000", cwd=folder, **stores),
        farebox(
            "keys", "create", "--account", account, "--name", "k", "--json", cwd=folder, **stores
        ),
    )
    return str(key.json["api_key"])


async def call(server: Running, key: str, **more: Any) -> Outcome:
    payload = {"model": "echo", "messages": [{"role": "user", "content": "hello"}], **more}
    return await exchange(server.base_url, chat(key, payload), deadline=20)


async def sum_of(server: Running, name: str) -> float:
    answer = await exchange(server.origin, METRICS)
    found = [line for line in answer.body.decode().splitlines() if line.startswith(name)]
    return sum(float(line.split()[-1]) for line in found)


def clients_of(pid: int, port: int) -> int:
    connections = psutil.Process(pid).net_connections("tcp")
    return sum(1 for c in connections if c.raddr and c.laddr.port == port)


async def test_two_workers_share_the_port_the_metrics_and_the_stop(
    folder: Path, stores: dict[str, str]
) -> None:
    key = await paying_key(folder, stores)
    with running_serve(folder, "--workers", "2", **stores) as server:
        first, second = server.facts["workers"]
        port = int(server.origin.rpartition(":")[2])
        answers: list[Outcome] = []

        async def both_busy() -> bool | None:
            """One burst; the kernel may give all of its connections to the same worker."""
            calls = asyncio.gather(*(call(server, key, stream=True) for _ in range(40)))
            busy = False
            while not calls.done():
                busy = busy or bool(clients_of(first, port) and clients_of(second, port))
                await asyncio.wait([calls], timeout=0.02)
            answers.extend(calls.result())
            return True if busy else None

        async def counted() -> bool | None:
            return True if await sum_of(server, REQUESTS) == len(answers) else None

        await eventually(both_busy, 60)
        assert {answer.status for answer in answers} == {200}
        await eventually(counted)
        # Whichever worker answers, it answers for both.
        assert [await sum_of(server, REQUESTS) for _ in range(6)] == [len(answers)] * 6

        os.kill(first, signal.SIGKILL)

        async def replaced() -> bool | None:
            running = psutil.Process(server.process.pid).children()
            return True if is_gone(first) and len(running) == 2 else None

        async def at_rest() -> bool | None:
            return True if await sum_of(server, "farebox_inflight_requests") == 0 else None

        await eventually(replaced)
        assert (await call(server, key)).status == 200
        await eventually(at_rest)
        pids = [child.pid for child in psutil.Process(server.process.pid).children()]
        server.process.terminate()
        assert await server.exit_status() == 0
        assert all(map(is_gone, pids))
    # What the killed worker had not posted yet waits in the till's outbox: nothing is lost.
    audit = await farebox("audit", cwd=folder, **stores)
    assert (audit.status, audit.out.splitlines()[-1]) == (0, "clean"), audit.out


async def test_a_stop_cuts_no_stream_of_any_worker(folder: Path, stores: dict[str, str]) -> None:
    key = await paying_key(folder, stores)
    with running_serve(folder, "--workers", "2", **stores) as server:
        async with connect(server.base_url) as conn:
            payload = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}
            await conn.send(chat(key, {**payload, "stream": True}))
            await conn.head()
            server.process.terminate()
            said = b"".join([piece.data async for piece in conn.body()])
        assert await server.exit_status() == 0

    assert said.endswith(b"data: [DONE]\n\n")


async def test_every_missing_secret_is_named_at_once(folder: Path) -> None:
    (folder / "remote.toml").write_text(REMOTE)
    serve = await farebox("serve", "--config", "remote.toml", cwd=folder)
    check = await farebox("check", "--config", "remote.toml", cwd=folder)

    for done in (serve, check):
        assert done.status == 78
        assert done.err.splitlines() == [
            "farebox: FAREBOX_KEYS__PEPPER: not set",
            "farebox: FAREBOX_PROVIDERS__ONE__KEY: not set",
            "farebox: FAREBOX_PROVIDERS__TWO__KEY: not set",
        ]


async def test_a_weak_pepper_and_a_wrong_url_are_refused(folder: Path) -> None:
    weak, wrong = await asyncio.gather(
        farebox("serve", cwd=folder, FAREBOX_KEYS__PEPPER="change-me" * 5),
        farebox(
            "accounts", "list", cwd=folder, FAREBOX_DATABASE_URL="db:5432", FAREBOX_TILL_URL="x"
        ),
    )

    assert (weak.status, wrong.status) == (78, 78)
    assert weak.err.startswith("farebox: FAREBOX_KEYS__PEPPER: one piece repeated; use at least")
    assert [line.split(":")[1].strip() for line in wrong.err.splitlines()] == [
        "FAREBOX_DATABASE_URL",
        "FAREBOX_TILL_URL",
    ]


async def test_a_database_that_was_not_migrated_is_refused_until_it_is(
    folder: Path, empty_url: str, till_url: str
) -> None:
    env = {
        "FAREBOX_DATABASE_URL": empty_url,
        "FAREBOX_BOOK__ROLES": "shared",
        "FAREBOX_TILL_URL": till_url,
        "FAREBOX_KEYS__PEPPER": PEPPER,
    }
    serve, listed, audit = await asyncio.gather(
        farebox("serve", "--port", "0", cwd=folder, **env),
        farebox("accounts", "list", cwd=folder, **env),
        farebox("audit", cwd=folder, **env),
    )
    first = await farebox("migrate", "--json", cwd=folder, **env)
    again = await farebox("migrate", cwd=folder, **env)
    after = await farebox("accounts", "list", "--json", cwd=folder, **env)

    assert (serve.status, listed.status, audit.status) == (1, 1, 2)
    for done in (serve, listed, audit):
        assert "run farebox migrate" in done.err
        assert "Traceback" not in done.err
    assert first.json["applied"]
    assert (again.status, again.out) == (0, "nothing to do\n")
    assert after.json == []


async def test_stores_that_are_away_are_one_clear_line(folder: Path, till_url: str) -> None:
    env = {
        "FAREBOX_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
        "FAREBOX_BOOK__ROLES": "shared",
        "FAREBOX_TILL_URL": till_url,
        "FAREBOX_KEYS__PEPPER": PEPPER,
    }
    for done in await asyncio.gather(
        farebox("serve", "--port", "0", cwd=folder, **env),
        farebox("migrate", cwd=folder, **env),
        farebox("receipts", "list", cwd=folder, **env),
    ):
        assert done.status == 1
        assert len(done.err.splitlines()) == 1
        assert done.err.startswith("farebox: Postgres did not answer in time. (")


@pytest.mark.skipif(len(allowed_cpus()) < 2, reason="needs Linux and two processors")
async def test_a_pinned_worker_has_a_processor_that_its_parent_leaves_alone(
    folder: Path, stores: dict[str, str]
) -> None:
    cpus = os.sched_getaffinity(0)
    first = min(cpus)
    with running_serve(folder, FAREBOX_SERVER__PIN_WORKERS="true", **stores) as server:
        (worker,) = server.facts["workers"]
        assert os.sched_getaffinity(worker) == {first}
        assert os.sched_getaffinity(server.process.pid) == cpus - {first}
        os.kill(worker, signal.SIGKILL)

        async def replaced() -> bool | None:
            children = psutil.Process(server.process.pid).children()
            others = [child.pid for child in children if child.pid != worker]
            return bool(others and os.sched_getaffinity(others[0]) == {first}) or None

        await eventually(replaced)
