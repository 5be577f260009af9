"""Signing in with a key, through the real gateway: once, by one, and only with the right answer."""

import asyncio
from typing import Any

import pytest

from billing import book
from billing.payments import credit_transfer
from gateway.api import login_limits
from gateway.client_address import read_networks
from gateway.supervise import Tasks
from tests.support.gateway import Gateway, eventually, make_settings, running_gateway
from tests.support.payments import transfer_from
from tests.support.siwe_cases import PARTS, SIGNATURES, TEXTS
from tests.support.upstream.launch import Upstream
from tests.support.wallets import KeyWallet, Visitor, visiting, write_message

COUNTS = """
SELECT
    (SELECT count(*) FROM users) AS users, (SELECT count(*) FROM wallets) AS wallets,
    (SELECT count(*) FROM billing_accounts) AS accounts,
    (SELECT count(*) FROM virtual_keys WHERE is_default) AS keys
"""


async def counts(gateway: Gateway) -> set[int]:
    row = await gateway.pool.fetchrow(COUNTS)
    assert row is not None
    return set(row.values())


def refused(answer: Any) -> str:
    """The message of a refused sign-in."""
    assert answer.status_code == 401, answer.text
    error = answer.json()["error"]
    assert error["code"] == "login_refused"
    assert "set-cookie" not in answer.headers
    return str(error["message"])


async def test_a_wallet_signs_in_and_is_known(gateway: Gateway, visitor: Visitor) -> None:
    wallet = KeyWallet()
    entered = await visitor.sign_in(wallet)

    assert entered.status_code == 200, entered.text
    cookies = [value.lower() for value in entered.headers.get_list("set-cookie")]
    session = next(cookie for cookie in cookies if cookie.startswith("farebox="))
    assert {"httponly", "samesite=strict", "path=/"} <= set(session.split("; "))
    known = await visitor.session()
    assert known.status_code == 200, known.text
    assert known.json()["wallets"] == [wallet.address]
    assert known.json() == entered.json()
    again = await visitor.sign_in(wallet)
    assert again.json()["user_id"] == known.json()["user_id"]
    assert await counts(gateway) == {1}


async def test_whatever_is_refused_by_looking_uses_nothing_up(
    gateway: Gateway, visitor: Visitor
) -> None:
    """One nonce outlasts them all: none of them came as far as the till."""
    wallet, nonce = KeyWallet(), await visitor.nonce()
    pid = gateway.services.sign_in.helper.pid
    for parts in PARTS.values():
        text = write_message(wallet.address, nonce, **parts(nonce))
        # Capitals of an address in digits are the same address.
        if parts(nonce) != {"domain": nonce["domain"]}:
            refused(await visitor.verify(text, wallet.sign(text)))
    for change in TEXTS.values():
        text = change(write_message(wallet.address, nonce))
        answer = await visitor.verify(text, wallet.sign(text))
        assert answer.status_code in (400, 401), answer.text
    for change in SIGNATURES.values():
        text = write_message(wallet.address, nonce)
        refused(await visitor.verify(text, change(wallet.sign(text))))

    text = write_message(wallet.address, nonce)
    assert (await visitor.verify(text, wallet.sign(text))).status_code == 200
    assert pid in (None, gateway.services.sign_in.helper.pid)


async def test_a_nonce_has_one_winner_of_twenty(gateway: Gateway, visitor: Visitor) -> None:
    wallet = KeyWallet()
    text = write_message(wallet.address, await visitor.nonce())
    # Each with its own connection and jar, all with the browser's cookie.
    cookies = dict(visitor.client.cookies)

    async def one() -> int:
        async with visiting(gateway) as other:
            other.client.cookies.update(cookies)
            return (await other.verify(text, wallet.sign(text))).status_code

    statuses = await asyncio.gather(*(one() for _ in range(20)))
    assert sorted(statuses) == [200, *[401] * 19]


async def test_a_nonce_is_for_the_browser_that_asked(gateway: Gateway, visitor: Visitor) -> None:
    wallet, nonce = KeyWallet(), await visitor.nonce()
    text = write_message(wallet.address, nonce)
    async with visiting(gateway) as other:
        assert "cookie" in refused(await other.verify(text, wallet.sign(text)))
        await other.nonce()
        assert "nonce" in refused(await other.verify(text, wallet.sign(text)))
    invented = write_message(wallet.address, {**nonce, "nonce": "0" * 32})
    assert "nonce" in refused(await visitor.verify(invented, wallet.sign(invented)))

    assert (await visitor.verify(text, wallet.sign(text))).status_code == 200


async def test_a_signature_counts_for_its_address_and_message(visitor: Visitor) -> None:
    wallet, other = KeyWallet(), KeyWallet()
    first = write_message(wallet.address, await visitor.nonce())
    assert "signature" in refused(await visitor.verify(first, other.sign(first)))
    # Right by now, but the nonce was used up by the try.
    assert "nonce" in refused(await visitor.verify(first, wallet.sign(first)))
    second = write_message(wallet.address, await visitor.nonce())
    assert "signature" in refused(await visitor.verify(second, wallet.sign(first)))
    long = write_message(wallet.address, await visitor.nonce())
    assert "Contract" in refused(await visitor.verify(long, "0x" + "ab" * 200))


async def test_fifty_first_sign_ins_at_once_make_one_user(gateway: Gateway) -> None:
    wallet = KeyWallet()

    async def one() -> str:
        async with visiting(gateway) as visitor:
            entered = await visitor.sign_in(wallet)
            assert entered.status_code == 200, entered.text
            return str(entered.json()["account_id"])

    assert len(set(await asyncio.gather(*(one() for _ in range(50))))) == 1
    assert await counts(gateway) == {1}


async def test_what_waited_for_a_wallet_is_credited_when_it_is_proved(
    gateway: Gateway, visitor: Visitor
) -> None:
    first, second = KeyWallet(), KeyWallet()
    async with book.acquire(gateway.pool) as conn:
        for wallet in (first, second):
            settled = await credit_transfer(conn, transfer_from(wallet.address.lower()))
            assert settled.outcome == "suspense"

    await visitor.sign_in(first)
    assert await gateway.pool.fetchval(BALANCES) == 5_000_000_000
    await visitor.sign_in(second, "link")
    assert await gateway.pool.fetchval(BALANCES) == 10_000_000_000
    await visitor.sign_in(second)

    assert await gateway.pool.fetchval(BALANCES) == 10_000_000_000
    credits = (await visitor.client.get("/api/v1/credits")).json()["data"]
    assert credits["available"]["usd"] == "10"


BALANCES = "SELECT sum(balance_nanos)::bigint FROM billing_accounts"


async def test_a_second_wallet_is_linked_and_a_taken_one_is_not(
    gateway: Gateway, visitor: Visitor
) -> None:
    first, second, third = KeyWallet(), KeyWallet(), KeyWallet()
    user = (await visitor.sign_in(first)).json()["user_id"]
    linked = await visitor.sign_in(second, "link")
    assert linked.json() == {"wallet": second.address, "wallet_kind": "eoa"}
    assert (await visitor.sign_in(second, "link")).status_code == 200
    assert (await visitor.session()).json()["wallets"] == [first.address, second.address]
    async with visiting(gateway) as other:
        assert (await other.sign_in(second)).json()["user_id"] == user
    async with visiting(gateway) as other:
        assert (await other.sign_in(third, "link")).status_code == 401
        assert (await other.sign_in(third)).json()["user_id"] != user

    taken = await visitor.sign_in(third, "link")
    assert (taken.status_code, taken.json()["error"]["code"]) == (409, "wallet_taken")


async def test_who_verifies_may_die_at_any_time(gateway: Gateway, visitor: Visitor) -> None:
    helper = gateway.services.sign_in.helper
    assert (await visitor.sign_in(KeyWallet())).status_code == 200
    tasks, died = Tasks(), 0

    async def keep_killing() -> None:
        nonlocal died
        for _ in range(2):
            process = helper._helper.process if helper._helper else None
            if process is not None and process.returncode is None:
                process.kill()
                died += 1
                await process.wait()
            await asyncio.sleep(0)

    wallet, nonce = KeyWallet(), await visitor.nonce()
    text = write_message(wallet.address, nonce)
    answer = asyncio.ensure_future(visitor.verify(text, wallet.sign(text)))
    await tasks.start(keep_killing(), "killing")
    assert (await answer).status_code == 200
    assert died > 0

    async def alive() -> bool | None:
        return True if (await visitor.sign_in(wallet)).status_code == 200 else None

    await eventually(alive)
    await tasks.close()


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[]", b"{", b'{"message": 1, "signature": "0x"}', b"\xff", b'"' * 40_000],
    ids=str,
)
async def test_a_body_that_is_none_is_told_so(visitor: Visitor, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    url = "/api/v1/auth/verify"
    answer = await visitor.client.post(url, content=body, headers=headers)

    assert answer.status_code in (400, 413), answer.text
    assert "error" in answer.json()


async def test_sign_ins_are_limited_by_address_and_by_wallet(
    book_url: str, till_url: str, upstream: Upstream
) -> None:
    settings = make_settings(
        upstream.base_url,
        till__call_timeout_ms=2000,
        identity__tries_per_address_per_minute=40,
        identity__tries_per_wallet_per_minute=4,
        server__trusted_proxies=["127.0.0.1"],
    )
    async with (
        running_gateway(book_url, till_url, upstream.base_url, settings) as gateway,
        visiting(gateway) as visitor,
    ):
        wallet = KeyWallet()

        async def wrong() -> int:
            text = write_message(wallet.address, await visitor.nonce())
            return (await visitor.verify(text, wallet.sign(text + "!"))).status_code

        # Strangers know addresses: what they try must not keep the owner out.
        assert [await wrong() for _ in range(5)] == [401] * 5
        statuses = [(await visitor.sign_in(wallet)).status_code for _ in range(5)]
        assert statuses == [200, 200, 200, 200, 429]
        assert (await visitor.sign_in(KeyWallet())).status_code == 200
        answers = [await visitor.client.post("/api/v1/auth/nonce") for _ in range(30)]
        last = answers[-1]
        assert (last.status_code, last.json()["error"]["code"]) == (429, "rate_limited")
        assert 0 < int(last.headers["retry-after-ms"]) <= 2000
        visitor.client.headers["x-forwarded-for"] = "192.0.2.1"
        assert (await visitor.client.post("/api/v1/auth/nonce")).status_code == 200


async def test_strangers_with_many_addresses_do_not_fill_the_till(
    gateway: Gateway, visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(login_limits, "NONCES_MAX", 5)
    monkeypatch.setattr(gateway.services, "proxies", read_networks(["127.0.0.1"]))
    answers = []
    for number in range(8):
        visitor.client.headers["x-forwarded-for"] = f"192.0.2.{number}"
        answers.append(await visitor.client.post("/api/v1/auth/nonce"))

    assert [answer.status_code for answer in answers[:6]] == [200] * 5 + [503]
    assert 0 < int(answers[5].headers["retry-after"]) <= login_limits.NONCES_WINDOW_S
