"""The state machine of attempts: what may follow what; the book itself refuses the rest."""

import asyncio
from datetime import timedelta
from itertools import product
from uuid import UUID

import asyncpg
import pytest

from billing import book
from billing.book import Pool, as_tenant
from billing.errors import HashTaken
from billing.payment_attempts import due_attempts, end_attempt, events_of, note_check, submit
from billing.payment_states import ENDED, RETRY_LATER, STEPS, Code, Status, client_state, end_of
from billing.payments import credit_transfer
from tests.support.payments import (
    CHAIN,
    intent,
    new_hash,
    payer,
    status,
    submitted,
    transfer_from,
)

SET = """
UPDATE payment_attempts
SET status = $2,
    error_code = CASE WHEN $2 IN ('REJECTED', 'FAILED') THEN 'TX_REVERTED' END,
    tx_hash = CASE WHEN $2 = 'CREATED_INTENT' THEN tx_hash ELSE coalesce(tx_hash, $3) END,
    submitted_at = CASE WHEN $2 = 'CREATED_INTENT' THEN submitted_at
                        ELSE coalesce(submitted_at, now()) END,
    ended_at = CASE WHEN $2 IN ('CREDITED', 'REJECTED', 'FAILED') THEN now() END
WHERE id = $1
"""


async def attempt_in(pool: Pool, state: Status) -> UUID:
    account_id, wallet = await payer(pool)
    if state is Status.CREATED_INTENT:
        return await intent(pool, account_id)
    transfer = transfer_from(wallet)
    attempt_id = await submitted(pool, account_id, transfer.tx_hash)
    async with book.acquire(pool) as conn:
        if state is Status.CREDITED:
            await credit_transfer(conn, transfer)
        elif state is Status.REJECTED:
            await end_attempt(conn, attempt_id, Code.SENDER_MISMATCH)
        elif state is Status.FAILED:
            await end_attempt(conn, attempt_id, Code.RECEIPT_NOT_FOUND)
    assert await status(pool, attempt_id) == state
    return attempt_id


@pytest.mark.parametrize("before", list(Status))
async def test_the_book_refuses_every_step_that_is_none(pool: Pool, before: Status) -> None:
    for after in Status:
        if after is before:
            continue
        attempt_id = await attempt_in(pool, before)
        # Nothing was credited, so not even the last step is one here.
        is_step = (before, after) in STEPS and after is not Status.CREDITED
        try:
            await pool.execute(SET, attempt_id, after.value, new_hash())
        except asyncpg.RestrictViolationError:
            went = False
        else:
            went = True
        assert went == is_step, (before, after)
        assert await status(pool, attempt_id) == (after if is_step else before)


async def test_a_tenant_cannot_call_its_own_attempt_credited(pool: Pool, tenants: Pool) -> None:
    account_id, _ = await payer(pool)
    attempt_id = await submitted(pool, account_id, new_hash())

    async def steal() -> None:
        async with as_tenant(tenants, account_id) as conn:
            await conn.execute(SET, attempt_id, "CREDITED", None)

    with pytest.raises(book.BookRefused) as caught:
        await steal()
    assert "no transfer was credited" in caught.value.reason
    assert await status(pool, attempt_id) == "PENDING_UNVERIFIED"


async def test_an_attempt_that_has_ended_is_not_ended_again(pool: Pool) -> None:
    for state in ENDED:
        attempt_id = await attempt_in(pool, state)
        async with book.acquire(pool) as conn:
            before = await events_of(conn, attempt_id)
            assert await end_attempt(conn, attempt_id, Code.TX_REVERTED) == "known"
            assert await events_of(conn, attempt_id) == before
        assert await status(pool, attempt_id) == state


@pytest.mark.parametrize("code", sorted(RETRY_LATER))
async def test_a_lagging_node_ends_nothing(pool: Pool, code: Code) -> None:
    attempt_id = await attempt_in(pool, Status.PENDING_UNVERIFIED)
    async with book.acquire(pool) as conn:
        with pytest.raises(AssertionError):
            await end_attempt(conn, attempt_id, code)
        for _ in range(3):
            await note_check(conn, attempt_id, code)
        checks = [e for e in await events_of(conn, attempt_id) if e["error_code"] == code]
    assert [check["event"] for check in checks] == ["VERIFICATION_ATTEMPTED"]
    assert await status(pool, attempt_id) == "PENDING_UNVERIFIED"


async def test_attempts_are_looked_at_in_turn(pool: Pool) -> None:
    first, second = [await attempt_in(pool, Status.PENDING_UNVERIFIED) for _ in range(2)]
    await attempt_in(pool, Status.CREATED_INTENT)
    await attempt_in(pool, Status.CREDITED)
    async with book.acquire(pool) as conn:
        due = await due_attempts(conn, CHAIN, timedelta(seconds=10), 10)
        assert [row["id"] for row in due] == [first, second]
        await note_check(conn, first, Code.RPC_ERROR)
        due = await due_attempts(conn, CHAIN, timedelta(seconds=10), 10)
        assert [row["id"] for row in due] == [second]
        due = await due_attempts(conn, CHAIN, timedelta(0), 10)
        assert [row["id"] for row in due] == [second, first]
        assert await due_attempts(conn, CHAIN + 1, timedelta(0), 10) == []


async def test_a_hash_is_taken_as_a_tenant_by_one_of_many(pool: Pool, tenants: Pool) -> None:
    payers = [await payer(pool) for _ in range(20)]
    attempts = [(account_id, await intent(pool, account_id)) for account_id, _ in payers]
    tx_hash = new_hash()

    async def take(account_id: UUID, attempt_id: UUID) -> str:
        try:
            async with as_tenant(tenants, account_id) as conn:
                return await submit(conn, account_id, attempt_id, tx_hash)
        except HashTaken:
            return "taken"

    said = await asyncio.gather(*(take(*attempt) for attempt in attempts * 2))

    assert sorted(said) == ["known", "submitted"] + ["taken"] * 38


def test_every_code_ends_an_attempt_one_way_or_is_no_end() -> None:
    ends = {code: end_of(code) for code in Code if code not in RETRY_LATER}
    assert {Status.REJECTED, Status.FAILED} == set(ends.values())
    assert all((Status.PENDING_UNVERIFIED, after) in STEPS for after in ends.values())


def test_clients_see_three_states() -> None:
    seen = {(s, units): client_state(s, units) for s, units in product(Status, (0, 5))}
    assert {s for (s, units), shown in seen.items() if shown == "CONFIRMED"} == {Status.CREDITED}
    assert seen[Status.CREDITED, 0] == "PENDING_VERIFICATION"
    failed = {s for (s, _), shown in seen.items() if shown == "FAILED"}
    assert failed == {Status.REJECTED, Status.FAILED}
