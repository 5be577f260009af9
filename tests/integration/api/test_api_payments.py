"""Paying in over HTTP: intents, hashes, who may see what, and that a hash gives nobody anything."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
import msgspec
import pytest
import pytest_asyncio
from eth_utils.address import to_checksum_address

from billing import book
from billing.payment_attempts import end_attempt, expire_attempts
from billing.payment_states import Code
from billing.payments import credit_transfer, reverse_transfer
from config.ids import id_text, read_id
from gateway.suspense import credit_waiting, tell_till
from tests.support.gateway import Gateway
from tests.support.payments import (
    INSERT_WALLET,
    TOKEN,
    TREASURY,
    key_of,
    new_address,
    new_hash,
    transfer_from,
)
from tests.support.people import Person, calling, signed_in

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def eve(gateway: Gateway) -> AsyncIterator[Person]:
    async with signed_in(gateway, "0") as person:
        yield person


async def new_attempt(person: Person, cents: int = 500) -> str:
    made = await person.post("/payments/intents", {"amount_usd_cents": cents}, 201)
    return str(made["attempt_id"])


async def submit(person: Person, attempt_id: str, tx_hash: str) -> httpx.Response:
    return await person.ask("POST", f"/payments/attempts/{attempt_id}/submit", {"tx_hash": tx_hash})


async def wallet_of(gateway: Gateway, person: Person) -> str:
    wallet = new_address()
    await gateway.pool.execute(INSERT_WALLET, person.account_id, wallet)
    return wallet


async def test_an_intent_says_what_to_send_where(gateway: Gateway, alice: Person) -> None:
    made = await alice.post("/payments/intents", {"amount_usd_cents": 1234}, 201)

    # With their checksums, as wallets want them.
    token, treasury = to_checksum_address(TOKEN), to_checksum_address(TREASURY)
    assert (made["token"], made["to"], made["chain_id"]) == (token, treasury, 8453)
    assert (made["amount_raw"], made["amount_usd_cents"]) == ("12340000", 1234)
    assert made["link"] == (f"ethereum:{token}@8453/transfer?address={treasury}&uint256=12340000")
    shown = await alice.get(f"/payments/attempts/{made['attempt_id']}")
    assert (shown["status"], shown["tx_hash"]) == ("PENDING_VERIFICATION", None)
    assert shown["expires_at"] == made["expires_at"]
    (listed,) = (await alice.get("/payments/attempts"))["data"]
    assert {**listed, "transfers": []} == shown


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"amount_usd_cents": 99},
        {"amount_usd_cents": 1_000_001},
        {"amount_usd_cents": "500"},
        {"amount_usd_cents": 500.5},
        {"amount_usd_cents": True},
        {"amount_usd_cents": 500, "billing_account_id": "acct_x"},
    ],
)
async def test_an_intent_that_is_none_is_refused(alice: Person, body: Any) -> None:
    error = await alice.post("/payments/intents", body, 400)
    assert error["code"] == "invalid_request"


@pytest.mark.parametrize(
    "tx_hash", ["", "0x12", "ab" * 33, "0x" + "zz" * 32, "0x" + "ab" * 32 + "\n", "0x" + "ab" * 33]
)
async def test_what_is_no_hash_is_refused(eve: Person, tx_hash: str) -> None:
    attempt_id = await new_attempt(eve)
    answer = await submit(eve, attempt_id, tx_hash)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tx_hash")


async def test_a_payment_is_confirmed_and_can_be_spent(gateway: Gateway, eve: Person) -> None:
    transfer = transfer_from(await wallet_of(gateway, eve))
    attempt_id = await new_attempt(eve)
    answer = await submit(eve, attempt_id, "0X" + transfer.tx_hash[2:].upper())
    assert answer.status_code == 200, answer.text
    waiting = answer.json()
    assert (waiting["status"], waiting["tx_hash"]) == ("PENDING_VERIFICATION", transfer.tx_hash)

    async with book.acquire(gateway.pool) as conn:
        settled = await credit_transfer(conn, transfer)
    await tell_till(gateway.services, settled)

    shown = await eve.get(f"/payments/attempts/{attempt_id}")
    assert shown["status"] == "CONFIRMED"
    assert shown["credited"] == {"credits": "5000", "usd": "5"}
    assert not shown["is_partial"]
    (came,) = shown["transfers"]
    assert (came["state"], came["amount_raw"]) == ("credited", "5000000")
    assert (await eve.get("/credits"))["data"]["available"]["usd"] == "5"
    again = await submit(eve, attempt_id, transfer.tx_hash)
    assert (again.status_code, again.json()["status"]) == (200, "CONFIRMED")


async def test_a_partial_payment_says_so(gateway: Gateway, eve: Person) -> None:
    transfer = transfer_from(await wallet_of(gateway, eve), 1_000_000)
    attempt_id = await new_attempt(eve)
    await submit(eve, attempt_id, transfer.tx_hash)
    async with book.acquire(gateway.pool) as conn:
        await credit_transfer(conn, transfer)

    shown = await eve.get(f"/payments/attempts/{attempt_id}")
    assert (shown["status"], shown["is_partial"]) == ("CONFIRMED", True)


async def test_of_two_accounts_with_one_hash_at_once_one_wins(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two hundred at once: the limit of an hour has a test of its own.
    monkeypatch.setattr("gateway.api.payments.SUBMISSIONS_PER_HOUR", 1000)
    async with signed_in(gateway) as one, signed_in(gateway) as other:
        tx_hash = new_hash()
        mixed = "0x" + "".join(c.upper() if n % 2 else c for n, c in enumerate(tx_hash[2:]))
        attempts = [(p, await new_attempt(p)) for p in (one, other) for _ in range(2)]
        jobs = [(p, a, h) for p, a in attempts for h in (tx_hash, mixed) for _ in range(25)]

        answers = await asyncio.gather(*(submit(*job) for job in jobs))

        won = {job[1] for job, got in zip(jobs, answers, strict=True) if got.status_code == 200}
        assert Counter(got.status_code for got in answers) == {200: 50, 409: 150}
        assert len(won) == 1
        codes = {got.json()["error"]["code"] for got in answers if got.status_code == 409}
        assert codes == {"tx_hash_taken"}
        query = "SELECT count(*) FROM payment_attempts WHERE tx_hash = $1"
        assert await gateway.pool.fetchval(query, tx_hash) == 1
        events = "SELECT count(*) FROM payment_events WHERE tx_hash = $1 AND event = 'TX_SUBMITTED'"
        assert await gateway.pool.fetchval(events, tx_hash) == 1


async def test_an_attempt_keeps_its_first_hash(eve: Person) -> None:
    attempt_id = await new_attempt(eve)
    assert (await submit(eve, attempt_id, new_hash())).status_code == 200

    answer = await submit(eve, attempt_id, new_hash())

    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "attempt_closed")
    assert answer.headers["x-should-retry"] == "false"


async def test_attempts_of_others_are_not_there(alice: Person, bob: Person) -> None:
    theirs, tx_hash = await new_attempt(alice), new_hash()
    nobodys = "pay_" + "0" * 26
    for attempt_id in (theirs, nobodys, "pay_x", theirs.replace("pay_", "key_")):
        assert (await submit(bob, attempt_id, tx_hash)).status_code == 404
        assert (await bob.get(f"/payments/attempts/{attempt_id}", 404))["code"] == "not_found"
    assert (await bob.get("/payments/attempts"))["data"] == []
    assert (await bob.get(f"/payments/attempts?cursor={theirs}"))["data"] == []


async def test_pages_of_attempts_are_whole(eve: Person) -> None:
    made = [await new_attempt(eve, 100 + n) for n in range(5)]

    first = await eve.get("/payments/attempts?limit=3")
    rest = await eve.get(f"/payments/attempts?limit=3&cursor={first['next_cursor']}")

    assert [each["id"] for each in first["data"] + rest["data"]] == made[::-1]
    assert (first["has_more"], rest["has_more"]) == (True, False)


async def test_an_account_makes_five_intents_and_ten_submissions_an_hour(eve: Person) -> None:
    made = [await new_attempt(eve) for _ in range(5)]
    error = await eve.post("/payments/intents", {"amount_usd_cents": 500}, 429)
    assert error["code"] == "rate_limited"
    first = new_hash()
    answers = [await submit(eve, made[0], first) for _ in range(12)]
    assert {got.status_code for got in answers} == {200}  # the same again costs nothing
    answers = [await submit(eve, made[0], new_hash()) for _ in range(10)]
    assert Counter(got.status_code for got in answers) == {409: 9, 429: 1}
    assert int(answers[-1].headers["retry-after"]) > 0


async def test_a_key_needs_the_permission(gateway: Gateway, alice: Person) -> None:
    plain = await alice.new_key()
    paying = await alice.new_key(scopes=["payments"])
    async with calling(gateway, plain["key"]) as caller:
        error = await caller.post("/payments/intents", {"amount_usd_cents": 500}, 403)
        assert error["code"] == "permission_missing"
    async with calling(gateway, paying["key"]) as caller:
        await new_attempt(caller)


async def test_without_a_treasury_nobody_can_pay_in(
    gateway: Gateway, alice: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = gateway.services.settings
    elsewhere = {"token": "", "id": 1}
    real = {"development": False}
    for change in ({"treasury": ""}, elsewhere, {"treasury": "0x12"}, real):
        chain = msgspec.structs.replace(settings.chain, **change)
        monkeypatch.setattr(
            gateway.services, "settings", msgspec.structs.replace(settings, chain=chain)
        )
        error = await alice.post("/payments/intents", {"amount_usd_cents": 500}, 503)
        assert error["code"] == "payments_unavailable"


async def test_a_late_hash_is_taken_and_one_that_is_too_late_ends_the_attempt(
    gateway: Gateway, eve: Person
) -> None:
    late, too_late, forgotten = [await new_attempt(eve) for _ in range(3)]
    await age(gateway, late, "40 minutes")
    for attempt_id in (too_late, forgotten):
        await age(gateway, attempt_id, "100 minutes")
    assert (await submit(eve, late, new_hash())).status_code == 200

    answer = await submit(eve, too_late, new_hash())

    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "intent_expired")
    shown = await eve.get(f"/payments/attempts/{too_late}")
    assert (shown["status"], shown["error_code"]) == ("FAILED", "INTENT_EXPIRED")
    async with book.acquire(gateway.pool) as conn:
        assert await expire_attempts(conn, timedelta(hours=1), 100) == 1
        assert await expire_attempts(conn, timedelta(hours=1), 100) == 0
    shown = await eve.get(f"/payments/attempts/{forgotten}")
    assert (shown["status"], shown["error_code"]) == ("FAILED", "INTENT_EXPIRED")


async def age(gateway: Gateway, attempt_id: str, by: str) -> None:
    uid = read_id(attempt_id)
    await gateway.tamper("ALTER TABLE payment_intents DISABLE TRIGGER USER")
    await gateway.tamper(
        "UPDATE payment_intents SET created_at = created_at - $2::text::interval,"
        " expires_at = expires_at - $2::text::interval"
        " WHERE id = (SELECT payment_intent_id FROM payment_attempts WHERE id = $1)",
        uid,
        by,
    )
    await gateway.tamper("ALTER TABLE payment_intents ENABLE TRIGGER USER")


async def test_what_failed_says_why(gateway: Gateway, eve: Person) -> None:
    attempt_id = await new_attempt(eve)
    await submit(eve, attempt_id, new_hash())
    async with book.acquire(gateway.pool) as conn:
        assert await end_attempt(conn, read_id(attempt_id), Code.SENDER_MISMATCH) == "ended"
        assert await end_attempt(conn, read_id(attempt_id), Code.TX_REVERTED) == "known"

    shown = await eve.get(f"/payments/attempts/{attempt_id}")
    assert (shown["status"], shown["error_code"]) == ("FAILED", "SENDER_MISMATCH")


async def test_a_wallet_that_is_linked_gets_what_waited_for_it(
    gateway: Gateway, eve: Person
) -> None:
    wallet = new_address()
    async with book.acquire(gateway.pool) as conn:
        assert (await credit_transfer(conn, transfer_from(wallet))).outcome == "suspense"
    await gateway.pool.execute(INSERT_WALLET, eve.account_id, wallet)

    await credit_waiting(gateway.services, wallet)

    assert (await eve.get("/credits"))["data"]["available"]["usd"] == "5"


async def test_an_account_that_spent_what_the_chain_lost_is_refused_until_it_is_back(
    gateway: Gateway, eve: Person
) -> None:
    transfer = transfer_from(await wallet_of(gateway, eve))
    attempt_id = await new_attempt(eve)
    await submit(eve, attempt_id, transfer.tx_hash)
    key = await gateway.key(eve.account_id)

    async def settle(call: Any) -> int:
        async with book.acquire(gateway.pool) as conn:
            await tell_till(gateway.services, await call(conn))
        body = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}
        async with httpx.AsyncClient(headers={"authorization": f"Bearer {key}"}) as client:
            answer = await client.post(gateway.base_url + "/chat/completions", json=body)
        await gateway.at_rest()
        return answer.status_code

    assert await settle(lambda conn: credit_transfer(conn, transfer)) == 200
    lost = await settle(lambda conn: reverse_transfer(conn, key_of(transfer), "reorg"))
    assert lost == 403
    shown = await eve.get(f"/payments/attempts/{attempt_id}")
    assert (shown["status"], shown["credited"]["usd"]) == ("PENDING_VERIFICATION", "0")

    assert await settle(lambda conn: credit_transfer(conn, transfer)) == 200
    assert (await eve.get(f"/payments/attempts/{attempt_id}"))["status"] == "CONFIRMED"


async def test_an_operator_sees_what_waits_and_says_whose_it_is(
    gateway: Gateway, eve: Person, operator: Person
) -> None:
    transfer = transfer_from(new_address())
    async with book.acquire(gateway.pool) as conn:
        await credit_transfer(conn, transfer)
    (waiting,) = [
        row
        for row in (await operator.get("/operator/payments/suspense"))["data"]
        if row["tx_hash"] == transfer.tx_hash
    ]
    assert (waiting["suspense_reason"], waiting["amount"]["usd"]) == ("unknown_sender", "5")
    wish = {
        "chain_id": 8453,
        "tx_hash": transfer.tx_hash,
        "ordinal": 0,
        "account_id": account_ref(eve.account_id),
        "note": "by letter",
    }

    first = await operator.post("/operator/payments/claim", wish)
    again = await operator.post("/operator/payments/claim", wish)

    assert first == again
    assert first["balance"]["usd"] == "5"
    assert (await eve.get("/credits"))["data"]["available"]["usd"] == "5"
    await operator.post("/operator/payments/claim", {**wish, "ordinal": 1}, 404)
    other = {**wish, "account_id": account_ref(await gateway.account())}
    assert (await operator.post("/operator/payments/claim", other, 409))["code"] == "conflict"


def account_ref(account_id: UUID) -> str:
    return f"acct_{id_text(account_id)}"
