"""What a session can do, from where, for how long, and how it ends: everywhere within 5 seconds."""

import asyncio
import time
from uuid import UUID, uuid4

import httpx
import pytest

from billing import book
from gateway.till_memory import TillMemory
from keys.session import Session, Sessions, SessionTerms, is_session_id, new_secret, sealed
from tests.support.gateway import Gateway, eventually, make_settings, running_gateway
from tests.support.upstream.launch import Upstream
from tests.support.wallets import KeyWallet, Visitor, enter, stamp, visiting, write_message

CHAT = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}
WITHIN_S = 5.0


async def rich(gateway: Gateway, visitor: Visitor) -> UUID:
    """Be signed in, and have credit; the id of the account."""
    session = await enter(gateway, visitor)
    async with book.acquire(gateway.pool) as conn:
        state = await book.grant(conn, session.account_id, 10**12, str(uuid4()), "test")
    await gateway.services.till.seed(state)
    return session.account_id


async def chat(visitor: Visitor, **headers: str) -> httpx.Response:
    return await visitor.client.post("/v1/chat/completions", json=CHAT, headers=headers)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def test_a_session_spends_from_its_account(gateway: Gateway, visitor: Visitor) -> None:
    account_id = await rich(gateway, visitor)
    answer = await chat(visitor)

    assert answer.status_code == 200, answer.text
    (receipt,) = await gateway.receipts(1)
    assert receipt["billing_account_id"] == account_id
    assert receipt["app_key_id"] is None
    assert receipt["price_nanos"] > 0
    await gateway.at_rest()


async def test_only_our_own_pages_may_change_something(gateway: Gateway, visitor: Visitor) -> None:
    await rich(gateway, visitor)
    for origin in ("https://evil.example", "null", gateway.origin + "0", gateway.origin + "/", ""):
        assert code(await chat(visitor, origin=origin)) == (403, "origin_mismatch")
        for path in ("logout", "logout-all", "link", "verify"):
            body = {"message": "a", "signature": "0x"} if path in ("link", "verify") else None
            headers = {"origin": origin}
            url = f"/api/v1/auth/{path}"
            answer = await visitor.client.post(url, json=body, headers=headers)
            assert code(answer) == (403, "origin_mismatch"), path
    del visitor.client.headers["origin"]
    assert code(await chat(visitor)) == (403, "origin_mismatch")
    # Reading is for everybody who has the cookie, and browsers give it to nobody else.
    assert (await visitor.session()).status_code == 200
    assert (await visitor.client.get("/v1/models")).status_code == 200


async def test_who_sends_a_key_is_not_asked_for_a_cookie(
    gateway: Gateway, visitor: Visitor
) -> None:
    key = await gateway.key()
    await rich(gateway, visitor)
    bearer = {"authorization": f"Bearer {key}", "origin": "https://evil.example"}

    assert (await chat(visitor, **bearer)).status_code == 200
    assert (await chat(visitor, **{**bearer, "authorization": "Bearer x"})).status_code == 401
    answer = await visitor.client.get("/api/v1/auth/session", headers=bearer)
    assert code(answer) == (403, "session_required")
    (receipt,) = await gateway.receipts(1)
    assert receipt["app_key_id"] is not None
    await gateway.at_rest()


@pytest.mark.parametrize("value", ["", "x", "a" * 43, "a" * 4000, "%00", '"', "\u0661".encode()])
async def test_a_cookie_that_is_no_session_opens_nothing(
    value: str | bytes, gateway: Gateway
) -> None:
    raw = value if isinstance(value, bytes) else value.encode()
    async with visiting(gateway) as visitor:
        visitor.client.headers = httpx.Headers(
            [*visitor.client.headers.raw, (b"cookie", b"a=b; farebox=" + raw)]
        )
        assert code(await visitor.session()) == (401, "session_invalid")
        assert code(await chat(visitor)) == (401, "session_invalid")


async def test_two_sessions_in_one_request_are_none(gateway: Gateway, visitor: Visitor) -> None:
    await enter(gateway, visitor)
    secret = visitor.client.cookies["farebox"]
    visitor.client.cookies.clear()
    visitor.client.headers["cookie"] = f"farebox={secret}; farebox={'a' * 43}"

    assert (await visitor.session()).status_code == 401
    visitor.client.headers["cookie"] = f"x=y; farebox={secret}"
    assert (await visitor.session()).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/api/v1/auth/session"])
async def test_who_calls_is_said_once(path: str, gateway: Gateway, visitor: Visitor) -> None:
    """A proxy may have read the first of two, and let it pass; the last of them counted here."""
    await enter(gateway, visitor)
    key = f"Bearer {await gateway.key()}"
    cookie = f"farebox={visitor.client.cookies['farebox']}"
    visitor.client.cookies.clear()
    method = "POST" if "chat" in path else "GET"
    body = CHAT if method == "POST" else None
    for name, value, other in (
        ("authorization", key, "Bearer x"),
        ("authorization", key, key),
        ("x-api-key", key[7:], "x"),
        ("cookie", cookie, "a=b"),
        ("origin", gateway.origin, "https://evil.example"),
    ):
        headers = [("cookie", cookie)] if name == "origin" else []
        headers += [(name, other), (name, value)]
        visitor.client.headers.pop("origin", None)
        answer = await visitor.client.request(method, path, json=body, headers=headers)
        assert code(answer) == (400, "invalid_request"), name
    twice = [("authorization", key), ("x-other", "1"), ("x-other", "2")]
    answer = await visitor.client.request(method, path, json=body, headers=twice)
    assert answer.status_code == (403 if "auth" in path else 200)


async def test_the_till_knows_no_secret_of_a_session(gateway: Gateway, visitor: Visitor) -> None:
    nonce = await visitor.nonce()
    before = visitor.client.cookies["farebox-login"]
    wallet = KeyWallet()
    text = write_message(wallet.address, nonce)
    assert (await visitor.verify(text, wallet.sign(text))).status_code == 200
    secret = visitor.client.cookies["farebox"]
    assert is_session_id(secret.encode())
    command = gateway.services.link.command
    for key in await command(("KEYS", "fb:*")):
        if key.startswith((b"fb:session:", b"fb:nonce:")):
            content = key + await command(("GET", key))
            assert (await command(("TTL", key))) > 0
            for hidden in (secret, before, nonce["nonce"]):
                assert hidden.encode() not in content
    assert await command(("EXISTS", f"fb:session:{sealed(secret.encode())}")) == 1


async def test_signing_in_again_ends_the_session_before(gateway: Gateway, visitor: Visitor) -> None:
    await visitor.sign_in(KeyWallet())
    old = visitor.client.cookies["farebox"]
    await visitor.sign_in(KeyWallet())
    assert visitor.client.cookies["farebox"] != old

    async with visiting(gateway) as other:
        other.client.cookies["farebox"] = old
        assert code(await other.session()) == (401, "session_invalid")


@pytest.mark.parametrize("path", ["logout", "logout-all"])
async def test_signing_out_is_known_to_all_workers_within_five_seconds(
    path: str, gateway: Gateway, till_url: str, upstream: Upstream
) -> None:
    # Once with the time that a worker remembers by default, once without waiting for it.
    cache_ttl_ms = 4000 if path == "logout" else 300
    settings = make_settings(
        upstream.base_url, till__call_timeout_ms=2000, keys__cache_ttl_ms=cache_ttl_ms
    )
    async with (
        running_gateway(gateway.book_url, till_url, upstream.base_url, settings) as second,
        visiting(gateway) as visitor,
        visiting(second) as other,
    ):
        await rich(gateway, visitor)
        secret = visitor.client.cookies["farebox"]
        other.client.cookies["farebox"] = secret
        assert (await chat(other)).status_code == 200
        assert (await other.session()).status_code == 200
        left = await visitor.client.post(f"/api/v1/auth/{path}")
        began = time.monotonic()
        assert (left.status_code, left.content) == (204, b"")
        assert "farebox" not in visitor.client.cookies
        visitor.client.cookies.set("farebox", secret, domain="127.0.0.1")
        assert code(await visitor.session()) == (401, "session_invalid")

        async def out() -> bool | None:
            return True if (await chat(other)).status_code == 401 else None

        await eventually(out)
        assert time.monotonic() - began < WITHIN_S
        await second.at_rest()
        again = await visitor.client.post("/api/v1/auth/logout")
        assert again.status_code == 204


async def test_all_sessions_of_a_user_end_and_nobody_elses(gateway: Gateway) -> None:
    wallet = KeyWallet()
    async with visiting(gateway) as one, visiting(gateway) as two, visiting(gateway) as other:
        for visitor in (one, two):
            await enter(gateway, visitor, wallet)
        await enter(gateway, other)
        await one.client.post("/api/v1/auth/logout-all")

        assert (await two.session()).status_code == 401
        assert (await other.session()).status_code == 200


async def test_a_frozen_account_is_told_so(gateway: Gateway, visitor: Visitor) -> None:
    await rich(gateway, visitor)
    await gateway.pool.execute("UPDATE billing_accounts SET status = 'frozen'")

    assert code(await visitor.session()) == (403, "account_frozen")
    assert (await visitor.client.post("/api/v1/auth/logout")).status_code == 204


async def test_who_is_frozen_may_still_throw_others_out(gateway: Gateway, visitor: Visitor) -> None:
    """Thawed, an account had all its leaked keys and stolen sessions back."""
    await rich(gateway, visitor)
    client, keys = visitor.client, "/api/v1/keys"
    key = (await client.post(keys, json={"name": "leaked"})).json()
    wish = {"budget": {"credits": "1"}, "expires_at": stamp(600)}
    grant = (await client.post("/api/v1/grants", json=wish)).json()
    await gateway.pool.execute("UPDATE billing_accounts SET status = 'frozen'")

    async def is_frozen() -> bool | None:
        return (await visitor.session()).status_code == 403 or None

    await eventually(is_frozen)
    patched = await client.patch(f"{keys}/{key['id']}", json={"budget": None})
    revoked = [
        await client.delete(f"{keys}/{key['id']}"),
        await client.delete(f"/api/v1/grants/{grant['id']}"),
    ]
    assert code(patched) == (403, "account_frozen")
    assert [(one.status_code, one.json()["status"]) for one in revoked] == [(200, "revoked")] * 2
    assert (await client.post("/api/v1/auth/logout-all")).status_code == 204
    await gateway.pool.execute("UPDATE billing_accounts SET status = 'active'")
    assert (await visitor.session()).status_code == 401
    assert (await chat(visitor, authorization=f"Bearer {key['key']}")).status_code == 401


async def test_without_the_till_nobody_is_let_in(gateway: Gateway, visitor: Visitor) -> None:
    await enter(gateway, visitor)
    await gateway.services.link.close()

    assert code(await visitor.session()) == (503, "unavailable")
    assert (await visitor.client.post("/api/v1/auth/nonce")).status_code == 503
    gateway.pool.terminate()


def session_for(seconds: int) -> Session:
    now = int(time.time())
    ids = {"user_id": uuid4(), "account_id": uuid4(), "virtual_key_id": uuid4()}
    return Session(**ids, wallet="0x", kind="eoa", created_at=now, expires_at=now + seconds)


async def test_a_session_ends_by_idling_and_in_any_case_at_its_end(gateway: Gateway) -> None:
    memory = TillMemory(gateway.services.link)
    terms = SessionTerms(ttl_s=3, idle_s=2, contract_ttl_s=1, per_user_max=3)
    sessions = Sessions(memory, terms)
    lasting, idle = session_for(100), session_for(100)
    short = session_for(1)
    used, left = sealed((await sessions.begin(lasting)).encode()), await sessions.begin(idle)
    brief = sealed((await sessions.begin(short)).encode())
    assert await sessions.find(brief) == short

    async def is_over() -> bool | None:
        await sessions.touch(used, lasting)
        await sessions.touch(brief, short)
        ended = [await sessions.find(one) is None for one in (sealed(left.encode()), brief)]
        return True if all(ended) else None

    await eventually(is_over)
    assert await sessions.find(used) == lasting


async def test_one_more_session_than_a_user_may_have_ends_the_oldest(gateway: Gateway) -> None:
    terms = SessionTerms(ttl_s=100, idle_s=100, contract_ttl_s=1, per_user_max=3)
    sessions = Sessions(TillMemory(gateway.services.link), terms)
    first = session_for(100)
    digests = []
    for age in range(5):
        session = Session(
            **{
                name: getattr(first, name)
                for name in ("user_id", "account_id", "virtual_key_id", "wallet", "kind")
            },
            created_at=first.created_at,
            expires_at=first.expires_at + age,
        )
        digests.append(sealed((await sessions.begin(session)).encode()))

    assert [await sessions.find(one) is None for one in digests] == [True] * 2 + [False] * 3
    assert set(await sessions.end_all(first.user_id)) == set(digests[2:])
    assert await sessions.end(sealed(new_secret().encode())) is None
    assert [await sessions.find(one) for one in digests] == [None] * 5


async def test_a_flood_of_sign_ins_keeps_no_call_waiting(
    gateway: Gateway, visitor: Visitor
) -> None:
    await rich(gateway, visitor)
    wallet = KeyWallet()
    hostile = write_message(wallet.address, await visitor.nonce(), resources=["a://" + "1" * 2000])
    lags: list[float] = []

    async def watch() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.005)
            lags.append(time.perf_counter() - began - 0.005)

    async with visiting(gateway) as flooding:
        texts = []
        for _ in range(30):
            nonce = await flooding.nonce()
            text = write_message(wallet.address, nonce)
            signature = wallet.sign(text + "!")
            texts.append((text, signature, flooding.client.cookies["farebox-login"]))
        watching = asyncio.ensure_future(watch())

        async def wrong(text: str, signature: str, cookie: str) -> int:
            body = {"message": text, "signature": signature}
            headers = {"cookie": f"farebox-login={cookie}"}
            url = "/api/v1/auth/verify"
            return (await flooding.client.post(url, json=body, headers=headers)).status_code

        flood = [wrong(*one) for one in texts]
        flood += [wrong(hostile, texts[0][1], texts[0][2]) for _ in range(100)]
        answering = asyncio.ensure_future(chat(visitor))
        statuses = await asyncio.gather(*flood)
        answer = await answering
        watching.cancel()
    assert set(statuses) == {401}
    assert answer.status_code == 200
    # In this process one of them would take 10 ms, and the hostile ones seconds.
    assert sorted(lags)[len(lags) * 9 // 10] < 0.1
    await gateway.at_rest()


async def test_a_session_that_ends_before_it_began_does_not_work(gateway: Gateway) -> None:
    class Racing(TillMemory):
        """All sessions of the user are ended between two steps of a beginning one."""

        async def put(self, key: str, value: bytes, ttl_s: int) -> None:
            await others.end_all(session.user_id)
            await super().put(key, value, ttl_s)

    session = session_for(100)
    terms = SessionTerms(ttl_s=9, idle_s=9, contract_ttl_s=9, per_user_max=9)
    others = Sessions(TillMemory(gateway.services.link), terms)
    secret = await Sessions(Racing(gateway.services.link), terms).begin(session)

    assert await others.find(sealed(secret.encode())) is None
