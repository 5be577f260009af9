"""A real gateway on the test's own event loop, and what tests ask of it."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg
import msgspec

from billing import book, history
from billing.money import read_credits
from billing.prices_store import sync_config_prices
from config.ids import new_id, read_id
from config.load import load
from config.secret import Secret
from config.settings import Settings
from gateway.metrics import Metrics
from gateway.rates import config_rates
from gateway.server import drain, make_server
from gateway.services import Services, open_services
from gateway.supervisor import listen
from keys.store import KeyTerms, create_key

PEPPER = "p" * 16 + "e" * 16 + "r" * 16
UPSTREAM_KEY = "upstream-key"
PRICE = {"input_usd_per_mtok": "1", "cached_input_usd_per_mtok": "0.5", "output_usd_per_mtok": "4"}


class Gateway:
    """A running worker with its stores."""

    def __init__(self, services: Services, base_url: str, book_url: str) -> None:
        self.services = services
        self.base_url = base_url
        self.origin = base_url.removesuffix("/v1")
        self.book_url = book_url

    @property
    def pool(self) -> asyncpg.Pool:
        return self.services.pool

    async def tamper(self, query: str, *args: Any) -> None:
        """Change the book as nobody who serves may."""
        conn = await asyncpg.connect(self.book_url)
        try:
            await conn.execute(query, *args)
        finally:
            await conn.close()

    async def account(self, credits: str = "1000") -> UUID:
        """A new account with that many credits, known to book and till."""
        async with book.acquire(self.pool) as conn:
            account_id = await book.create_account(conn, "test")
            if read_credits(credits):
                state = await book.grant(
                    conn, account_id, read_credits(credits), f"g_{new_id()}", "test"
                )
                await self.services.till.seed(state)
        return account_id

    async def key(
        self, account_id: UUID | None = None, *, credits: str = "1000", **terms: Any
    ) -> str:
        """A new API key; of a new account unless one is given."""
        if account_id is None:
            account_id = await self.account(credits)
        wanted = KeyTerms(**{"name": "test", "kind": "test", **terms})
        async with book.acquire(self.pool) as conn:
            _, key = await create_key(conn, account_id, wanted, pepper=PEPPER.encode())
        return key.secret

    async def account_of(self, key: str) -> UUID:
        query = "SELECT billing_account_id FROM app_api_keys WHERE last4 = $1"
        account_id = await self.pool.fetchval(query, key[-4:])
        assert isinstance(account_id, UUID)
        return account_id

    async def receipt(self, receipt_id: str) -> dict[str, Any]:
        """The receipt, as soon as the book has it."""
        return await eventually(lambda: self._find(receipt_id))

    async def _find(self, receipt_id: str) -> dict[str, Any] | None:
        async with book.acquire(self.pool) as conn:
            return await history.find_receipt(conn, read_id(receipt_id))

    async def receipts(self, count: int) -> list[dict[str, Any]]:
        """All receipts, as soon as there are that many."""

        async def enough() -> list[dict[str, Any]] | None:
            async with book.acquire(self.pool) as conn:
                rows = await history.list_receipts(conn, None, None, 100_000)
            return rows if len(rows) >= count else None

        rows = await eventually(enough)
        assert len(rows) == count, f"{len(rows)} receipts instead of {count}"
        return rows

    async def at_rest(self) -> None:
        """Wait until no call is open and everything is in the book and confirmed."""

        async def idle() -> bool | None:
            services = self.services
            is_idle = services.open_calls == 0 and services.settler.is_idle
            return True if is_idle else None

        await eventually(idle)


async def eventually(probe: Any, timeout_s: float = 10.0) -> Any:
    """The first result of probe that is not None."""
    async with asyncio.timeout(timeout_s):
        while True:
            result = await probe()
            if result is not None:
                return result
            await asyncio.sleep(0.01)


def zoo_model(mode: str, **more: object) -> dict[str, object]:
    """A priced model served by the upstream process in one of its modes."""
    route = {"provider": "zoo", "model": mode}
    return {"routes": [route], "price": PRICE, "output_tokens_max": 500, **more}


def make_settings(
    upstream_url: str,
    models: Mapping[str, Mapping[str, object]] | None = None,
    **overrides: object,
) -> Settings:
    """Settings in front of the upstream process; overrides as server__port=0."""
    values: dict[str, object] = {
        "keys.pepper": Secret(PEPPER),
        "keys.mode": "test",
        "book.roles": "shared",
        "metrics.open": True,
        "limits.open_requests_per_key": 1000,
        "limits.open_requests_per_account": 1000,
        # A busy machine is no reason to refuse a call of a test.
        "limits.loop_lag_max_ms": 60_000,
        "providers": {
            "zoo": {"kind": "openai", "base_url": upstream_url, "key": Secret(UPSTREAM_KEY)},
            "echo": {"kind": "echo"},
        },
        "models": {
            "echo": {"routes": [{"provider": "echo"}], "price": PRICE},
            "plain": zoo_model("plain"),
            **(models or {}),
        },
    }
    values |= {name.replace("__", "."): value for name, value in overrides.items()}
    return load(None, {}, values).settings


@asynccontextmanager
async def running_gateway(
    book_url: str, till_url: str, upstream_url: str, settings: Settings | None = None
) -> AsyncIterator[Gateway]:
    """A worker that listens on a free port of 127.0.0.1; drained at the end."""
    settings = settings or make_settings(upstream_url)
    settings = msgspec.structs.replace(
        settings,
        book=msgspec.structs.replace(settings.book, url=Secret(book_url)),
        till=msgspec.structs.replace(settings.till, url=Secret(till_url)),
    )
    conn = await book.connect(book_url)
    await sync_config_prices(conn, config_rates(settings))
    await conn.close()
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    async with open_services(settings, Metrics()) as services:
        server = make_server(settings, services)
        serving = asyncio.get_running_loop().create_task(server.serve(sockets=[sock]))
        try:
            yield Gateway(services, f"http://127.0.0.1:{port}/v1", book_url)
        finally:
            never = asyncio.get_running_loop().create_task(asyncio.Event().wait())
            await drain(server, serving, never)
            never.cancel()
            sock.close()
