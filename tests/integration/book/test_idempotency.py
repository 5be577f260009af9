"""Claims in the book: one holder at any time, and none takes over what has a charge."""

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID

import pytest

from billing import book
from billing.book import Pool
from billing.errors import IdempotencyCompleted, IdempotencyInFlight, IdempotencyMismatch
from billing.idempotency import (
    Claim,
    Holder,
    claim_of,
    claim_request,
    purge_idempotent_requests,
    release_claim,
)
from billing.posting import post_receipts
from billing.receipts import ChargeReceipt
from config.ids import new_id
from tests.support.books import Account, make_account, open_pool


@pytest.fixture
async def pool(book_url: str) -> AsyncIterator[Pool]:
    async with open_pool(book_url, 8) as pool:
        yield pool


def claim_by(account: Account, body: bytes = b"{}", key: bytes = b"k") -> Claim:
    return claim_of(account.virtual_key_id, key, body, new_id())


async def is_abandoned(_: Holder) -> bool:
    return True


async def take(pool: Pool, claim: Claim) -> UUID | None:
    async with book.acquire(pool) as conn:
        return await claim_request(conn, claim, is_abandoned)


async def post(pool: Pool, receipt: ChargeReceipt) -> None:
    async with book.acquire(pool) as conn:
        await post_receipts(conn, [receipt])


async def age(pool: Pool, claim: Claim, seconds: int) -> None:
    query = "UPDATE idempotent_requests SET created_at = now() - $2 * interval '1 s'"
    await pool.execute(query + " WHERE request_id = $1", claim.request_id, seconds)


async def holder(pool: Pool) -> UUID | None:
    found = await pool.fetchval("SELECT request_id FROM idempotent_requests")
    assert found is None or isinstance(found, UUID)
    return found


async def test_of_many_claims_at_once_one_holds(pool: Pool) -> None:
    account = await make_account(pool)
    claims = [claim_by(account) for _ in range(40)]
    results = await asyncio.gather(*(take(pool, c) for c in claims), return_exceptions=True)

    (winner,) = (c for c, result in zip(claims, results, strict=True) if result is None)
    assert sum(isinstance(result, IdempotencyInFlight) for result in results) == 39
    assert await holder(pool) == winner.request_id


async def test_of_many_that_find_a_voided_request_one_takes_over(pool: Pool) -> None:
    account = await make_account(pool)
    first = claim_by(account)
    await take(pool, first)
    await post(pool, account.receipt(0, request_id=first.request_id, outcome="voided"))
    claims = [claim_by(account) for _ in range(40)]
    results = await asyncio.gather(*(take(pool, c) for c in claims), return_exceptions=True)

    taken = [result for result in results if not isinstance(result, BaseException)]
    assert taken == [first.request_id]
    assert sum(isinstance(result, IdempotencyInFlight) for result in results) == 39
    assert await holder(pool) in {claim.request_id for claim in claims}


@pytest.mark.parametrize(
    ("price", "outcome"),
    [
        (5, "complete"),
        (0, "complete"),
        (0, "upstream_failed"),
        (0, "recovered"),
        (3, "client_left"),
    ],
)
async def test_what_may_have_cost_something_is_never_taken_over(
    pool: Pool, price: int, outcome: str
) -> None:
    account = await make_account(pool)
    first = claim_by(account)
    await take(pool, first)
    await age(pool, first, 10_000)
    await post(pool, account.receipt(price, request_id=first.request_id, outcome=outcome))
    with pytest.raises(IdempotencyCompleted) as caught:
        await take(pool, claim_by(account))

    assert (caught.value.request_id, caught.value.price_nanos) == (first.request_id, price)
    assert await holder(pool) == first.request_id


async def test_a_receipt_that_comes_while_the_till_is_looked_at_counts(pool: Pool) -> None:
    """The till had confirmed it a moment before it was asked, so it knew nothing any more."""
    account = await make_account(pool)
    first = claim_by(account)
    await take(pool, first)
    await age(pool, first, 61)

    async def meanwhile(_: Holder) -> bool:
        await post(pool, account.receipt(5, request_id=first.request_id))
        return True

    async with book.acquire(pool) as conn:
        with pytest.raises(IdempotencyCompleted):
            await claim_request(conn, claim_by(account), meanwhile)

    assert await holder(pool) == first.request_id


async def test_a_claim_that_another_took_over_meanwhile_stays_with_it(pool: Pool) -> None:
    account = await make_account(pool)
    first, rival = claim_by(account), claim_by(account)
    await take(pool, first)
    await age(pool, first, 61)

    async def meanwhile(_: Holder) -> bool:
        assert await take(pool, rival) == first.request_id
        return True

    async with book.acquire(pool) as conn:
        with pytest.raises(IdempotencyInFlight):
            await claim_request(conn, claim_by(account), meanwhile)

    assert await holder(pool) == rival.request_id


async def test_only_an_old_claim_is_asked_about_with_its_age(pool: Pool) -> None:
    account = await make_account(pool)
    first, asked = claim_by(account), []
    await pool.execute("UPDATE till_epoch SET epoch = 7, changed_at = now() - interval '500 s'")
    await take(pool, first)

    async def ask(found: Holder) -> bool:
        asked.append(found)
        return False

    for seconds in (0, 30, 58, 61, 4000):
        await age(pool, first, seconds)
        async with book.acquire(pool) as conn:
            with pytest.raises(IdempotencyInFlight):
                await claim_request(conn, claim_by(account), ask)

    assert [found.request_id for found in asked] == [first.request_id] * 2
    assert [found.age_s // 10 for found in asked] == [6, 400]
    assert {(found.epoch, found.epoch_age_s // 10) for found in asked} == {(7, 50)}


async def test_another_body_never_gets_the_claim(pool: Pool) -> None:
    account = await make_account(pool)
    first = claim_by(account)
    await take(pool, first)
    await age(pool, first, 10_000)
    for body in (b"{ }", b""):
        with pytest.raises(IdempotencyMismatch):
            await take(pool, claim_by(account, body))

    assert await holder(pool) == first.request_id


async def test_a_digest_depends_on_caller_key_and_body(pool: Pool) -> None:
    one, two = [await make_account(pool) for _ in range(2)]
    claims = [claim_by(one), claim_by(two), claim_by(one, key=b"other")]
    for claim in claims:
        assert await take(pool, claim) is None

    assert len({claim.key_digest for claim in claims}) == 3
    assert len({claim.body_digest for claim in claims}) == 3


async def test_only_the_holder_releases_its_claim(pool: Pool) -> None:
    account = await make_account(pool)
    first, second = claim_by(account), claim_by(account)
    await take(pool, first)
    async with book.acquire(pool) as conn:
        await release_claim(conn, second)
        assert await holder(pool) == first.request_id
        await release_claim(conn, first)
        assert await holder(pool) is None

    assert await take(pool, claim_by(account, b"mended")) is None


async def test_a_purge_forgets_what_is_old_and_nothing_else(pool: Pool) -> None:
    account = await make_account(pool)
    claims = [claim_by(account, key=b"%d" % number) for number in range(5)]
    for number, claim in enumerate(claims):
        await take(pool, claim)
        await age(pool, claim, number * 40_000)
    async with book.acquire(pool) as conn:
        assert await purge_idempotent_requests(conn, 200_000) == 0
        assert await purge_idempotent_requests(conn) == 2
        assert await purge_idempotent_requests(conn) == 0

    assert await pool.fetchval("SELECT count(*) FROM idempotent_requests") == 3
    with pytest.raises(IdempotencyInFlight):
        await take(pool, claim_by(account, key=b"0"))
    assert await take(pool, claim_by(account, b"new", key=b"4")) is None


async def test_a_purge_of_many_goes_in_steps(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billing.idempotency.PURGED_AT_ONCE", 3)
    account = await make_account(pool)
    for number in range(7):
        claim = claim_by(account, key=b"%d" % number)
        await take(pool, claim)
        await age(pool, claim, 100)
    async with book.acquire(pool) as conn:
        assert await purge_idempotent_requests(conn, 50) == 7

    assert await holder(pool) is None


async def test_what_a_sweeper_voided_is_not_run_again_while_its_worker_may_live(
    pool: Pool,
) -> None:
    """The worker comes back and is charged for it by an adjustment: two would be charged."""
    account = await make_account(pool)
    first, second = claim_by(account), claim_by(account)
    await take(pool, first)
    voided = {"outcome": "voided", "usage_source": "checkpoint"}
    await post(pool, account.receipt(0, request_id=first.request_id, **voided))
    asked: list[Holder] = []

    async def not_yet(found: Holder) -> bool:
        asked.append(found)
        return False

    with pytest.raises(IdempotencyInFlight):
        await take(pool, second)
    await age(pool, first, 3600)
    async with book.acquire(pool) as conn:
        with pytest.raises(IdempotencyInFlight):
            await claim_request(conn, second, not_yet)
    taken_from = await take(pool, second)

    assert [found.is_guessed for found in asked] == [True]
    assert taken_from == first.request_id
