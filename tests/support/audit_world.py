"""A small sound world for the audit's tests, made by the real code: to be copied and corrupted."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import count
from typing import Any
from uuid import UUID

import asyncpg
import msgspec
import redis.asyncio
from redis.asyncio import Redis

from billing import book, till_scan
from billing.audit import Invariant, Report
from billing.fleet import PoolBook
from billing.payment_attempts import Terms, create_intent
from billing.payments import credit_transfer, reverse_transfer
from billing.prices import Rates, charge_for
from billing.prices_store import load_prices, sync_config_prices
from billing.receipts import ChargeReceipt, Outcome, Provenance, encode_receipt
from billing.settler import Settler
from billing.sweep import Sweeper
from billing.till import Scripts, Till
from billing.till_link import TillLink
from billing.till_scopes import BudgetScope, SpendScopes, spend_scopes
from billing.usage import Usage, UsageSource
from billing.windows import BEGINNING
from config.ids import id_text, new_id
from keys.keys_store import revoke_any_key
from keys.store import KeyTerms, create_key
from migrations.runner import migrate
from tests.support.payments import (
    CHAIN,
    INSERT_WALLET,
    TOKEN,
    TREASURY,
    key_of,
    new_address,
    transfer_from,
)

SOUND, LOOSE = "audit_sound", "audit_loose"
REST_DB, OPEN_DB, COPY_DB, TRAFFIC_DB = 1, 2, 3, 4
RATES = Rates(
    input_rate=150_000_001,
    output_rate=600_000_007,
    cached_input_rate=75_000_003,
    cache_write_rate=187_500_001,
    reasoning_rate=700_000_009,
    audio_output_rate=9_000_000_011,
)
USAGE = Usage(
    input_tokens=1001,
    output_tokens=507,
    cached_tokens=203,
    cache_write_tokens=101,
    audio_input_tokens=7,
    reasoning_tokens=99,
    audio_output_tokens=11,
)
HOLD = 50_000_000
GUESSED = Usage(input_tokens=1001, output_tokens=99)
_numbers = count()


class Customer(msgspec.Struct):
    account_id: UUID
    app_key_id: UUID
    virtual_key_id: UUID
    has_budget: bool = False

    @property
    def budget(self) -> BudgetScope:
        return BudgetScope(
            virtual_key_id=self.virtual_key_id,
            window="total",
            starts_at=BEGINNING,
            limit_nanos=10**15,
        )

    @property
    def scopes(self) -> SpendScopes:
        budget = self.budget if self.has_budget else None
        return spend_scopes(self.account_id, self.app_key_id, budget=budget)

    def receipt(self, model: str = "plain", version: int | None = 1, **other: Any) -> ChargeReceipt:
        """A receipt priced by the real code."""
        uid, now = other.pop("request_id", None) or new_id(), datetime.now(UTC)
        hold = other.pop("hold_nanos", HOLD)
        usage = other.pop("usage", USAGE)
        reported = other.pop("reported", None)
        rates = None if version is None else other.pop("rates", RATES)
        charge = charge_for(usage, rates, reported, 20_000, hold)
        facts = {
            "outcome": Outcome.COMPLETE,
            "usage_source": UsageSource.PROVIDER,
            "started_at": now,
            "finished_at": now,
            "budget_window": "total" if self.has_budget else "",
            **msgspec.structs.asdict(usage),
            **other,
        }
        return ChargeReceipt(
            request_id=uid,
            source_reference=id_text(uid),
            billing_account_id=self.account_id,
            virtual_key_id=self.virtual_key_id,
            app_key_id=self.app_key_id,
            protocol="chat.completions",
            provider="openai",
            requested_model=model,
            price_version=version,
            markup_bps=20_000,
            hold_nanos=hold,
            provenance=Provenance.STREAM,
            reported_cost_usd=charge.reported_usd,
            provider_cost_nanos=charge.cost_nanos,
            price_nanos=charge.price_nanos,
            overrun_nanos=charge.overrun_nanos,
            cost_source=charge.cost_source,
            **facts,
        )


class Desk:
    """A worker without its HTTP: holds, settles, commits and confirms by the real code."""

    def __init__(self, pool: book.Pool, till: Till, settler: Settler) -> None:
        self.pool, self.till, self.settler = pool, till, settler

    async def serve(
        self, customer: Customer, receipt: ChargeReceipt, provider_s: float = 0
    ) -> None:
        """One request from hold to commit, with a provider that takes its time."""
        await self.hold(customer, receipt)
        self.till.forwarded(customer.scopes, receipt.source_reference)
        await asyncio.sleep(provider_s)
        settled = self.settler.submit(customer.scopes, receipt.source_reference, receipt)
        await asyncio.gather(settled.till_reply, settled.committed)

    async def hold(self, customer: Customer, receipt: ChargeReceipt) -> None:
        draft, request_id = encode_receipt(receipt), receipt.source_reference
        await self.till.admit(customer.scopes, request_id, receipt.hold_nanos, draft)

    async def abandon(self, customer: Customer, draft: ChargeReceipt, *, is_sent: bool) -> None:
        """A worker dies, and the sweeper ends what it had open."""
        await self.hold(customer, draft)
        scopes, request_id = customer.scopes, draft.source_reference
        if is_sent:
            self.till.forwarded(scopes, request_id)
        await self.till.link.command(("ZADD", scopes.leases_key, 1, request_id))
        await Sweeper(self.pool, self.till, grace_s=0, takeover_s=0).sweep()

    async def wake_up(self, customer: Customer, draft: ChargeReceipt, usage: Usage) -> None:
        """The worker lived after all, and says what the request really used."""
        own = customer.receipt(request_id=draft.request_id, usage=usage)
        settled = self.settler.submit(customer.scopes, own.source_reference, own)
        await asyncio.gather(settled.till_reply, settled.committed)


@asynccontextmanager
async def open_desk(book_url: str, till_url: str) -> AsyncIterator[Desk]:
    pool = await book.open_pool(book_url, 4, 5, 10_000)
    scripts = Scripts()
    link = TillLink(
        till_url, scripts.all(), call_timeout_s=5, stall_timeout_s=10, pending_max=10_000
    )

    till = Till(link, scripts, PoolBook(pool, "w_test"), worker="w_test", lease_ms=30_000)
    settler = Settler(
        pool, till, batch_max=64, pending_max=10_000, on_result=lambda name, number: None
    )
    link.start()
    assert await link.wait_up(5)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(settler.run_commits())
        tasks.create_task(settler.run_confirms())
        try:
            yield Desk(pool, till, settler)
        finally:
            settler.stop()
    await link.close()
    await pool.close()


async def new_customer(conn: asyncpg.Connection, credits: int) -> Customer:
    account_id = await book.create_account(conn, "somebody")
    key_id, _ = await create_key(conn, account_id, KeyTerms(name="app"), pepper=b"p" * 32)
    query = "SELECT virtual_key_id FROM app_api_keys WHERE id = $1"
    virtual_key_id = await conn.fetchval(query, key_id)
    reference = f"grant {next(_numbers)}"
    await book.grant(conn, account_id, credits * 10**6, reference, "test")
    return Customer(account_id, key_id, virtual_key_id)


def receipts_of(customer: Customer) -> list[ChargeReceipt]:
    """One of each kind that the gateway writes."""
    voided: dict[str, Any] = {"outcome": Outcome.VOIDED, "usage_source": UsageSource.NONE}
    exhausted: dict[str, Any] = {"outcome": Outcome.CREDIT_EXHAUSTED, "hold_nanos": 90_000}
    return [
        customer.receipt(),
        customer.receipt(usage=Usage(input_tokens=1, output_tokens=1)),
        customer.receipt("audio", 2, rates=msgspec.structs.replace(RATES, audio_input_rate=5)),
        customer.receipt("reported", None, reported=Decimal("0.000123456789012345")),
        customer.receipt("reported", None, reported=Decimal(0)),
        customer.receipt("gratis", None),
        customer.receipt(usage=Usage(), **voided, rates=None),
        customer.receipt(**exhausted),
        customer.receipt(outcome=Outcome.RECOVERED, usage_source=UsageSource.CHECKPOINT),
        customer.receipt(outcome=Outcome.CLIENT_LEFT, usage_source=UsageSource.COUNTED),
    ]


async def pay_in(conn: asyncpg.Connection) -> None:
    """Somebody pays twice; one payment was lost by the chain for a while. A stranger pays, too."""
    account_id = await book.create_account(conn, "payer")
    sender = new_address()
    await conn.execute(INSERT_WALLET, account_id, sender)
    terms = Terms(chain_id=CHAIN, token=TOKEN, treasury=TREASURY, amount_usd_cents=500)
    await create_intent(conn, account_id, terms)
    lost, kept, gone = transfer_from(sender), transfer_from(sender, 7), transfer_from(sender, 9)
    for transfer in (lost, kept, gone, transfer_from(new_address())):
        await credit_transfer(conn, transfer)
    for transfer in (lost, gone):
        await reverse_transfer(conn, key_of(transfer), "reorg")
    await credit_transfer(conn, lost)


async def serve_all(desk: Desk, customer: Customer) -> None:
    await asyncio.gather(*(desk.serve(customer, receipt) for receipt in receipts_of(customer)))


async def leave_to_the_sweeper(desk: Desk, customer: Customer) -> None:
    """Three requests of dead workers; two of these lived after all."""
    drafts = [customer.receipt(usage=GUESSED, outcome=Outcome.RECOVERED) for _ in range(3)]
    for number, draft in enumerate(drafts):
        await desk.abandon(customer, draft, is_sent=number < 2)
    await desk.wake_up(customer, drafts[1], msgspec.structs.replace(GUESSED, output_tokens=120))
    await desk.wake_up(customer, drafts[2], GUESSED)


class World(msgspec.Struct):
    """A sound database to copy, a copy of it without constraints, and two sound tills."""

    book_url: str
    till_url: str
    customers: list[Customer]
    held: ChargeReceipt
    forwarded: ChargeReceipt
    waiting: ChargeReceipt

    def url(self, name: str) -> str:
        return self.book_url.rpartition("/")[0] + f"/{name}"

    def till(self, number: int) -> str:
        return self.till_url.rpartition("/")[0] + f"/{number}"

    @asynccontextmanager
    async def copy(self, template: str) -> AsyncIterator[str]:
        name = f"audit_copy_{next(_numbers)}"
        await command(self.book_url, f"CREATE DATABASE {name} TEMPLATE {template}")
        yield self.url(name)
        await command(self.book_url, f"DROP DATABASE {name} WITH (FORCE)")


async def command(url: str, *queries: str) -> None:
    conn = await asyncpg.connect(url)
    try:
        for query in queries:
            await conn.execute(query)
    finally:
        await conn.close()


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[Redis]:
    client = redis.asyncio.from_url(url)
    try:
        yield client
    finally:
        await client.aclose()


async def copy_till(world: World, source: int, target: int) -> None:
    async with client_of(world.till(target)) as client:
        await client.flushdb()
    async with client_of(world.till(source)) as client:
        async for key in client.scan_iter(count=1000):
            await client.execute_command("COPY", key, key, "DB", target)


# The schema refuses most corruptions; a copy without constraints lets them in.
LOOSEN = """
DO $$
DECLARE c record;
BEGIN
    FOR c IN
        SELECT conrelid::regclass AS place, conname, contype
        FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace AND contype IN ('f', 'c', 'u', 'p')
        ORDER BY contype = 'f' DESC
    LOOP
        EXECUTE format('ALTER TABLE %s DROP CONSTRAINT IF EXISTS %I CASCADE', c.place, c.conname);
    END LOOP;
END $$
"""


async def build(postgres_url: str, valkey_url: str) -> World:
    await command(postgres_url, f"CREATE DATABASE {SOUND}")
    sound = postgres_url.rpartition("/")[0] + f"/{SOUND}"
    await migrate(sound)
    conn = await asyncpg.connect(sound)
    await sync_config_prices(conn, {"plain": RATES})
    audio = msgspec.structs.replace(RATES, audio_input_rate=5)
    await sync_config_prices(conn, {"plain": RATES, "audio": audio})
    dearer = msgspec.structs.replace(RATES, output_rate=RATES.output_rate + 10**9)
    await sync_config_prices(conn, {"plain": dearer})
    current = (await load_prices(conn)).at("plain", datetime.now(UTC))
    assert current is not None
    assert current.price_version == 3
    customers = [await new_customer(conn, 1000) for _ in range(4)]
    for customer in customers[:2]:
        customer.has_budget = True
    async with client_of(valkey_url) as client:
        await client.flushall()
    till_url = valkey_url.rpartition("/")[0] + f"/{REST_DB}"
    async with open_desk(sound, till_url) as desk:
        for customer in customers[:3]:
            await serve_all(desk, customer)
            if customer is customers[1]:
                await leave_to_the_sweeper(desk, customer)
            state = await book.grant(
                conn, customer.account_id, 7, f"again {next(_numbers)}", "after"
            )
            await till_scan.tell_account(till_url, state, 1)
    await revoke_any_key(conn, customers[2].app_key_id)
    await pay_in(conn)
    await conn.close()
    first = customers[0]
    # However slow this run is, the entry that waits in the outbox must not grow old.
    later = datetime.now(UTC) + timedelta(hours=1)
    world = World(
        book_url=postgres_url,
        till_url=valkey_url,
        customers=customers,
        held=first.receipt(),
        forwarded=first.receipt(),
        waiting=first.receipt(finished_at=later),
    )
    await copy_till(world, REST_DB, OPEN_DB)
    async with open_desk(sound, world.till(OPEN_DB)) as desk:
        for receipt in (world.held, world.forwarded, world.waiting):
            await desk.hold(first, receipt)
        desk.till.forwarded(first.scopes, world.forwarded.source_reference)
        data, request_id = encode_receipt(world.waiting), world.waiting.source_reference
        await desk.till.settle(first.scopes, request_id, world.waiting.price_nanos, data)
    await command(postgres_url, f"CREATE DATABASE {LOOSE} TEMPLATE {SOUND}")
    await command(world.url(LOOSE), LOOSEN)
    return world


async def tear_down(postgres_url: str) -> None:
    for name in (LOOSE, SOUND):
        await command(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


def explain(report: Report) -> str:
    return msgspec.json.format(msgspec.json.encode(report.checks)).decode()


def found(report: Report, invariant: Invariant) -> list[str]:
    (check,) = (check for check in report.checks if check.invariant == invariant)
    return [finding.what for finding in check.findings]
