"""A key's budget and workers that are processes of their own: at once, and when they are killed."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from billing.money import NANOS_PER_CREDIT
from tests.support.farebox import PEPPER, Done, Running, farebox, running_serve
from tests.support.gateway import eventually
from tests.support.rawclient import Outcome, chat, connect, exchange

WORDS, CALLS, AFFORDABLE, STREAMS = 40, 200, 20, 5
# A dead worker is known by its leases here, so within some seconds.
CONFIG = f"""
[keys]
mode = "test"
[limits]
output_tokens_min = {WORDS}
[till]
hold_lease_s = 1
renew_every_s = 0.2
call_timeout_ms = 5000
stall_timeout_ms = 10000
[work]
every_s = 0.2
sweep_grace_s = 0.5
takeover_after_s = 0.3
[providers.quick]
kind = "echo"
output_tokens = {WORDS}
[providers.slow]
kind = "echo"
chunk_delay_ms = 500
output_tokens = {WORDS}
[models.quick]
routes = [{{ provider = "quick" }}]
price = {{ input_usd_per_mtok = "1", output_usd_per_mtok = "4" }}
output_tokens_max = {WORDS}
[models.slow]
routes = [{{ provider = "slow" }}]
price = {{ input_usd_per_mtok = "1", output_usd_per_mtok = "4" }}
output_tokens_max = {WORDS}
"""
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "fare " * WORDS}]}
GRANTED = 1000 * NANOS_PER_CREDIT


class House:
    """A server of two workers, one account, and commands beside them."""

    def __init__(self, folder: Path, server: Running, env: dict[str, str]) -> None:
        self.folder, self.server, self.env = folder, server, env
        self.account = ""

    async def cli(self, *args: str) -> Done:
        return await farebox(*args, cwd=self.folder, **self.env)

    async def open_account(self) -> None:
        made = await self.cli("accounts", "create", "--json")
        self.account = made.json["billing_account_id"]
        await self.cli("credits", "grant", self.account, "1000")

    async def key(self, budget_nanos: int | None = None) -> dict[str, Any]:
        args = ["keys", "create", "--account", self.account, "--name", "k", "--json"]
        if budget_nanos is not None:
            whole, rest = divmod(budget_nanos, NANOS_PER_CREDIT)
            args += ["--budget", f"{whole}.{rest:06}", "--window", "total"]
        made: dict[str, Any] = (await self.cli(*args)).json
        return made

    async def call(self, key: dict[str, Any], model: str = "quick") -> Outcome:
        request = chat(key["api_key"], {"model": model, **ASKED})
        return await exchange(self.server.base_url, request, deadline=60)

    async def receipts(self) -> list[dict[str, Any]]:
        listed = await self.cli("receipts", "list", "--limit", "1000", "--json")
        rows: list[dict[str, Any]] = listed.json
        return rows

    async def audited(self) -> list[dict[str, Any]]:
        """All receipts, as soon as nothing is open any more and all agrees."""

        async def at_rest() -> Done | None:
            audit = await self.cli("audit", "--at-rest")
            return audit if audit.status == 0 else None

        await eventually(at_rest, 40)
        return await self.receipts()

    async def balance(self) -> int:
        shown = (await self.cli("accounts", "show", self.account, "--json")).json
        assert shown["available_nanos"] == shown["balance_nanos"]
        return int(shown["balance_nanos"])

    async def sizes(self) -> tuple[int, int]:
        """What a call holds, and what it costs."""
        free = await self.key()
        assert (await self.call(free)).status == 200
        (receipt,) = await self.audited()
        return receipt["hold_nanos"], receipt["price_nanos"]


@pytest.fixture
def house(book_url: str, till_url: str, tmp_path: Path) -> Iterator[House]:
    (tmp_path / "own.toml").write_text(CONFIG)
    env = {
        "FAREBOX_DATABASE_URL": book_url,
        "FAREBOX_BOOK__ROLES": "shared",
        "FAREBOX_TILL_URL": till_url,
        "FAREBOX_KEYS__PEPPER": PEPPER,
        "FAREBOX_CONFIG": str(tmp_path / "own.toml"),
    }
    with running_serve(tmp_path, "--workers", "2", **env) as server:
        yield House(tmp_path, server, env)


def spent_on(key: dict[str, Any], receipts: list[dict[str, Any]]) -> int:
    return sum(r["price_nanos"] for r in receipts if r["app_key_id"] == key["app_key_id"])


async def test_two_processes_never_spend_above_one_budget(house: House) -> None:
    """Two hundred calls at once on a key for twenty of them; the account pays no more than that."""
    await house.open_account()
    held, price = await house.sizes()
    limit = AFFORDABLE * price
    key = await house.key(limit)

    outcomes = await asyncio.gather(*(house.call(key) for _ in range(CALLS)))
    statuses = Counter(outcome.status for outcome in outcomes)
    # What was held too much came back, so some more may fit in; then it is at its end.
    while (last := await house.call(key)).status == 200:
        statuses[200] += 1
    receipts = await house.audited()

    assert set(statuses) == {200, 402}
    assert statuses[200] <= AFFORDABLE
    codes = {
        outcome.json()["error"]["code"] for outcome in (*outcomes, last) if outcome.status > 200
    }
    assert codes == {"key_limit_reached"}
    spent = spent_on(key, receipts)
    assert limit - held < spent == statuses[200] * price <= limit
    assert await house.balance() == GRANTED - price - spent


async def test_what_killed_workers_held_on_a_budget_comes_back(house: House) -> None:
    await house.open_account()
    held, _ = await house.sizes()
    key = await house.key(STREAMS * held)
    async with AsyncExitStack() as stack:
        for _ in range(STREAMS):
            conn = await stack.enter_async_context(connect(house.server.base_url, deadline=60))
            await conn.send(chat(key["api_key"], {"model": "slow", **ASKED, "stream": True}))
            assert (await conn.head()).status == 200
            await anext(conn.body())
        refused = await house.call(key)
        for pid in house.server.facts["workers"]:
            os.kill(pid, signal.SIGKILL)

    async def served() -> Outcome | None:
        try:
            answer = await house.call(key)
        except OSError:
            return None  # nobody listens yet
        return answer if answer.status == 200 else None

    assert (refused.status, refused.json()["error"]["code"]) == (402, "key_limit_reached")
    await eventually(served, 60)
    receipts = await house.audited()
    recovered = [r for r in receipts if r["outcome"] == "recovered"]
    assert len(recovered) == STREAMS
    assert all(0 < r["price_nanos"] < r["hold_nanos"] for r in recovered)
    spent = spent_on(key, receipts)
    assert spent <= STREAMS * held
    assert await house.balance() == GRANTED - sum(r["price_nanos"] for r in receipts)
