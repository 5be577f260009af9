"""What is compared: `direct` (no gateway), `gateway` (ours, metering on), peers by their URL.

The gateway is started as an operator would: `farebox serve` with one worker and embedded stores in
a folder of this run, key, holds, receipts, log and metrics on. Nothing of the caller's environment
reaches it, so a run never touches a real database.
"""

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from bench.cpu import all_stats, tree
from bench.loads import MODEL
from bench.processes import Child, ChildFailed, child

CREDITS = "100000000"
OPEN_MAX = 20_000
READY_S = 90.0
REST_S = 20.0

CONFIG = """\
[server]
port = 0
workers = {workers}
pin_workers = {pin}

[keys]
mode = "test"

[limits]
open_requests_per_key = {open_max}
open_requests_per_account = {open_max}
open_requests_per_worker = {open_max}
loop_lag_max_ms = 60000

[log]
path = "{folder}/gateway.log"

[providers.mock]
kind = "openai"
base_url = "{mock_url}/v1"

[models.{model}]
routes = [{{ provider = "mock" }}]
price = {{ input_usd_per_mtok = "0.15", output_usd_per_mtok = "0.60" }}
output_tokens_max = 100000
context_tokens = 1000000
"""


class Arm(msgspec.Struct, kw_only=True):
    """One base URL to send the loads to."""

    name: str
    host: str
    port: int
    path: str
    headers: dict[str, str] = {}
    model: str = MODEL
    groups: dict[str, tuple[int, tuple[int, ...]]] = {}
    """Process trees to account for: `gateway`, `till`, `book`."""


class Receipts(msgspec.Struct, frozen=True):
    """What the book says was billed; voided ones reached no provider."""

    billed: int
    voided: int
    input_tokens: int
    output_tokens: int


def arm_at(name: str, base_url: str, key: str = "", model: str = MODEL) -> Arm:
    """An arm behind an http:// base URL that ends before /chat/completions."""
    parts = urlsplit(base_url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{base_url}: the bench speaks plain http:// only")
    path = parts.path.rstrip("/") + "/chat/completions"
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return Arm(
        name=name,
        host=parts.hostname,
        port=parts.port or 80,
        path=path,
        headers=headers,
        model=model,
    )


@asynccontextmanager
async def running_mock(folder: Path, seed: int, port: int = 0) -> AsyncIterator[tuple[Child, str]]:
    """The mock and its address."""
    command = ("-m", "bench.mock", "--owned", "--seed", str(seed), "--port", str(port))
    async with child("mock", command, folder) as mock:
        line = await mock.line(READY_S)
        yield mock, line.split()[-1].decode()


class Gateway:
    """A running gateway and what its book says."""

    def __init__(self, arm: Arm, book_url: str, till_url: str) -> None:
        self.arm = arm
        self.book_url = book_url
        self.till_url = till_url

    async def receipts(self) -> Receipts:
        from billing.book import connect

        conn = await connect(self.book_url)
        try:
            row = await conn.fetchrow(COUNT_RECEIPTS)
        finally:
            await conn.close(timeout=5)
        assert row is not None
        return Receipts(*row)

    async def receipts_at_rest(self, is_enough: Callable[[Receipts], bool]) -> Receipts:
        """The receipts as soon as there are enough, or as they are after a while."""
        ends = time.monotonic() + REST_S
        while True:
            found = await self.receipts()
            if is_enough(found) or time.monotonic() > ends:
                return found
            await asyncio.sleep(0.05)

    async def audit(self) -> Any:
        """One whole audit at rest."""
        from gateway.cli.audit import run_audit

        return await run_audit(self.book_url, self.till_url, True)

    async def drift_nanos(self) -> int:
        """Balances minus the sum of their ledger rows, over all accounts."""
        from billing.book import connect

        conn = await connect(self.book_url)
        try:
            return int(await conn.fetchval(SUM_DRIFT))
        finally:
            await conn.close(timeout=5)


COUNT_RECEIPTS = """
SELECT
    count(*) FILTER (WHERE outcome <> 'voided'),
    count(*) FILTER (WHERE outcome = 'voided'),
    coalesce(sum(input_tokens), 0)::bigint,
    coalesce(sum(output_tokens), 0)::bigint
FROM charge_receipts
"""

SUM_DRIFT = """
SELECT
    (SELECT coalesce(sum(balance_nanos), 0) FROM billing_accounts)
    - (SELECT coalesce(sum(amount_nanos), 0) FROM credit_ledger)
"""


@asynccontextmanager
async def running_gateway(
    folder: Path, mock_url: str, workers: int = 1, *, pin: bool = False
) -> AsyncIterator[Gateway]:
    """A gateway in front of the mock. Raises ChildFailed when it does not come up."""
    from gateway.embedded.stores import open_stores

    pepper = secrets.token_hex(32)
    config, data = folder / "farebox.toml", folder / "data"
    text = CONFIG.format(
        workers=workers,
        pin="true" if pin else "false",
        open_max=OPEN_MAX,
        folder=folder,
        mock_url=mock_url,
        model=MODEL,
    )
    config.write_text(text, "utf-8")
    env = {name: value for name, value in os.environ.items() if not name.startswith("FAREBOX_")}
    env |= {"FAREBOX_KEYS__PEPPER": pepper, "FAREBOX_PROVIDERS__MOCK__KEY": "mock"}
    command = ("-m", "gateway", "serve", "--json", "--config", str(config), "--data-dir", str(data))
    async with child("gateway", command, folder, env) as serving:
        base_url = (await _facts(serving))["base_url"]
        async with open_stores(data, may_launch=False) as urls:
            arm = arm_at("gateway", base_url, await _key(urls.book_url, pepper))
            postgres, valkey = urls.pids["postgres"], urls.pids["valkey"]
            arm.groups = {
                "gateway": (serving.pid, (postgres, valkey)),
                "book": (postgres, ()),
                "till": (valkey, ()),
            }
            yield Gateway(arm, urls.book_url, urls.till_url)


async def _facts(serving: Child) -> Mapping[str, Any]:
    """What `serve --json` says when it serves: an indented object."""
    text = b""
    while not text.rstrip().endswith(b"}"):
        text += await serving.line(READY_S)
    facts: dict[str, Any] = msgspec.json.decode(text)
    return facts


async def _key(book_url: str, pepper: str) -> str:
    """A key of a new account with credits that do not run out."""
    from billing import book
    from billing.money import read_credits
    from keys.principal import Limits
    from keys.store import KeyTerms, create_key

    conn = await book.connect(book_url)
    try:
        account_id = await book.create_account(conn, "bench", OPEN_MAX)
        await book.grant(conn, account_id, read_credits(CREDITS), f"bench_{account_id}", "bench")
        terms = KeyTerms(name="bench", kind="test", limits=Limits(open_requests=OPEN_MAX))
        _, key = await create_key(conn, account_id, terms, pepper=pepper.encode())
    finally:
        await conn.close(timeout=5)
    return key.secret


def watched(arm: Arm, pid: int) -> None:
    """Account for a peer that runs on this machine. Raises ChildFailed when there is none."""
    if not tree(pid, all_stats()):
        raise ChildFailed(f"{arm.name}: there is no process {pid}")
    arm.groups = {"gateway": (pid, ())}
