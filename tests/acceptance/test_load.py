"""Many clients at once, some of them rude: every nano and every descriptor is accounted for.

The default run is a seeded sample; `pytest --full` takes the whole size.
"""

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import asyncpg
import pytest

from billing.audit import audit
from billing.money import credits_text, usd_text
from billing.till_scan import open_till, read_account_scope
from config.ids import id_text
from config.settings import Settings
from tests.support.gateway import Gateway, eventually, make_settings, running_gateway, zoo_model
from tests.support.rawclient import Ended, Leave, Outcome, RawRequest, chat, exchange
from tests.support.upstream.launch import Upstream

SEED = 20_260_729
AT_ONCE = 64
AFFORDABLE = 20
CALLERS = 200
PACED = "plain:tokens=12,delay_ms=3,chunk_delay_ms=1"
# Nobody's credit comes back before the last caller has asked.
SLOW = "plain:tokens=4,delay_ms=3000"
MODELS = {
    "paced": zoo_model(PACED),
    # The same hold for both: a hold counts the bytes of the whole request.
    "quick": zoo_model("plain:tokens=4"),
    "later": zoo_model(SLOW),
}
# About as many bytes as an answer has, head and framing included.
STREAM_BYTES, WHOLE_BYTES = 4800, 1700


def patient(upstream: Upstream) -> Settings:
    """Settings with which a busy machine is no reason to refuse a call."""
    late = {"till__call_timeout_ms": 5000, "till__stall_timeout_ms": 10_000}
    return make_settings(upstream.base_url, MODELS, **late)


def payload(model: str, *, stream: bool) -> dict[str, object]:
    messages = [{"role": "user", "content": "how much is the fare"}]
    return {"model": model, "messages": messages, "stream": stream, "max_tokens": 50}


class Load:
    """What a run of many calls was, and what its clients saw."""

    def __init__(self, count: int, key: str) -> None:
        rng = random.Random(SEED)
        self.requests: list[tuple[RawRequest, int | None, Leave]] = []
        for number in range(count):
            stream = number % 2 == 0
            request = chat(key, payload("paced", stream=stream))
            # From before the last bytes of the request to the last ones of the answer.
            longest = STREAM_BYTES if stream else WHOLE_BYTES
            cut = rng.randrange(-200, longest) if number % 3 == 0 else None
            self.requests.append((request, cut, rng.choice(list(Leave))))
        rng.shuffle(self.requests)
        self.outcomes: list[Outcome] = []

    async def run(self, base_url: str) -> None:
        free = asyncio.Semaphore(AT_ONCE)

        async def one(request: RawRequest, cut: int | None, leave: Leave) -> Outcome:
            async with free:
                return await exchange(
                    base_url, request, cut_after_bytes=cut, leave=leave, deadline=60
                )

        self.outcomes = await asyncio.gather(*(one(*request) for request in self.requests))

    @property
    def whole(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.ended is Ended.COMPLETE]

    @property
    def receipt_ids(self) -> set[str]:
        heads = [outcome.head for outcome in self.outcomes if outcome.head is not None]
        return {head.get("x-receipt-id") or "" for head in heads}

    @property
    def never_sent(self) -> int:
        """Requests of which the last bytes were kept back: nothing can be admitted."""
        return sum(1 for _, cut, _ in self.requests if cut is not None and cut < 0)


def descriptors() -> Counter[str]:
    """What this process has open, by kind."""
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        try:
            found[os.readlink(f"/proc/self/fd/{name}").split(":")[0]] += 1
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return found


async def check_money(gateway: Gateway, account_id: UUID, granted: int) -> None:
    """Ledger, balance and receipts agree to the nano, and the till has nothing open."""
    sums = await gateway.pool.fetchrow(
        "SELECT (SELECT sum(amount_nanos) FROM credit_ledger WHERE billing_account_id = $1),"
        " (SELECT balance_nanos FROM billing_accounts WHERE id = $1),"
        " (SELECT sum(price_nanos) FROM charge_receipts WHERE billing_account_id = $1)",
        account_id,
    )
    assert sums is not None
    ledger, balance, charged = map(int, sums)
    assert ledger == balance == granted - charged
    till_url = gateway.services.settings.till.url.reveal()
    scope = await read_account_scope(till_url, account_id)
    assert scope is not None
    assert (scope.posted, scope.held, scope.uncommitted, scope.open) == (balance, 0, 0, 0)
    async with open_till(till_url) as till:
        conn = await asyncpg.connect(gateway.book_url)
        report = await audit(conn, till, at_rest=True)
        await conn.close()
    assert report.is_clean, [check for check in report.checks if check.violations]


async def test_rude_clients_leave_one_receipt_each_and_nothing_open(
    book_url: str, till_url: str, upstream: Upstream, is_full: bool
) -> None:
    count = 2000 if is_full else 300
    settings = patient(upstream)
    before = descriptors()
    async with running_gateway(book_url, till_url, upstream.base_url, settings) as gateway:
        standing = len(gateway.services.tasks)
        account_id = await gateway.account("1000000")
        load = Load(count, await gateway.key(account_id))
        await load.run(gateway.base_url)
        await gateway.at_rest()

        served = upstream.stats()
        receipts = await gateway.receipts(served["requests"])
        ids = {f"rcpt_{id_text(receipt['request_id'])}" for receipt in receipts}
        assert load.receipt_ids <= ids
        assert len(ids) == len(receipts) <= count - load.never_sent
        assert served["served"] + served["aborted_by_peer"] == served["requests"]
        assert {outcome.status for outcome in load.whole} == {200}
        outcomes = Counter(receipt["outcome"] for receipt in receipts)
        assert set(outcomes) == {"complete", "client_left"}
        assert outcomes["complete"] >= len(load.whole) >= count * 2 // 3
        await check_money(gateway, account_id, 1_000_000 * 10**6)
        await eventually(lambda: holds(len(gateway.services.tasks) == standing))
    # Nothing more than before; what earlier tests left to the garbage collector may be gone.
    await eventually(lambda: holds(not descriptors() - before))


async def holds(condition: bool) -> bool | None:
    return condition or None


async def hold_of(gateway: Gateway, model: str) -> int:
    """What one call of the tests below holds."""
    key = await gateway.key()
    answer = await exchange(gateway.base_url, chat(key, payload(model, stream=False)))
    assert answer.head is not None
    receipt = await gateway.receipt(answer.head.get("x-receipt-id") or "")
    return int(receipt["hold_nanos"])


@asynccontextmanager
async def watched_till(till_url: str, account_id: UUID, balance: int) -> AsyncIterator[list[int]]:
    """Looks at the account's scope all the time: held and spent never exceed the balance."""
    seen: list[int] = []

    done = asyncio.Event()

    async def look() -> None:
        while not done.is_set():
            scope = await read_account_scope(till_url, account_id)
            if scope is not None and scope.posted is not None:
                seen.append(scope.held + scope.uncommitted + balance - scope.posted)

    task = asyncio.get_running_loop().create_task(look())
    try:
        yield seen
    finally:
        done.set()
        await task
    assert seen
    assert 0 <= min(seen) <= max(seen) <= balance


@pytest.mark.parametrize("gateways", [1, 2])
async def test_an_account_that_affords_twenty_calls_gets_twenty(
    book_url: str, till_url: str, upstream: Upstream, gateways: int
) -> None:
    settings = patient(upstream)
    args = (book_url, till_url, upstream.base_url, settings)
    async with running_gateway(*args) as first, running_gateway(*args) as second:
        hold = await hold_of(first, "quick")
        balance = AFFORDABLE * hold
        account_id = await first.account(credits_text(balance))
        request = chat(await first.key(account_id), payload("later", stream=False))
        doors = [first.base_url, second.base_url][:gateways]
        async with watched_till(till_url, account_id, balance) as seen:
            answers = await asyncio.gather(
                *(exchange(doors[n % gateways], request, deadline=60) for n in range(CALLERS))
            )
            await first.at_rest()
            await second.at_rest()
        assert max(seen) == balance
        statuses = Counter(answer.status for answer in answers)
        assert statuses == {200: AFFORDABLE, 402: CALLERS - AFFORDABLE}
        needed = f"up to {credits_text(hold)} credits (${usd_text(hold)})"
        for answer in answers:
            if answer.status == 402:
                error = answer.json()["error"]
                assert error["code"] == "insufficient_credits"
                assert needed in error["message"]
                assert "only 0 credits ($0) are available" in error["message"]
        assert upstream.stats()["requests"] == AFFORDABLE + 1
        await check_money(first, account_id, balance)


async def test_credit_that_comes_back_is_spent_but_never_more_than_was_there(
    book_url: str, till_url: str, upstream: Upstream
) -> None:
    settings = patient(upstream)
    async with running_gateway(book_url, till_url, upstream.base_url, settings) as gateway:
        balance = AFFORDABLE * await hold_of(gateway, "quick")
        account_id = await gateway.account(credits_text(balance))
        key = await gateway.key(account_id)
        requests = [chat(key, payload("quick", stream=n % 2 == 0)) for n in range(CALLERS)]
        async with watched_till(till_url, account_id, balance):
            answers = await asyncio.gather(
                *(exchange(gateway.base_url, request, deadline=60) for request in requests)
            )
            await gateway.at_rest()
        statuses = Counter(answer.status for answer in answers)
        assert set(statuses) <= {200, 402}
        assert statuses[200] >= AFFORDABLE
        await gateway.receipts(statuses[200] + 1)
        await check_money(gateway, account_id, balance)
