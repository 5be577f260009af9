"""Every route of a real gateway with every kind of credential: who gets in, and who gets nothing.

The routes are those of the OpenAPI document, so a new one is walked as soon as it is there. Two
people sign in with wallets; one of them tries everything on what belongs to the other.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest
from msgspec import Struct
from openai import AsyncOpenAI, AuthenticationError

from gateway.cli.context import DEMO_CONFIG
from keys.api_key import generate
from tests.support.farebox import Running, running_demo
from tests.support.gateway import eventually
from tests.support.wallets import KeyWallet, Visitor, visiting

HELLO = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}
IN_AN_HOUR = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
# What each route takes that would do something, should the caller get in.
BODIES: dict[str, Any] = {
    "POST /v1/chat/completions": HELLO,
    "POST /api/v1/auth/link": {"message": "m", "signature": "0x00"},
    "POST /api/v1/keys": {"name": "walked"},
    "PATCH /api/v1/keys/{key_id}": {"name": "stolen"},
    "POST /api/v1/keys/{key_id}/rotate": {"overlap_s": 0},
    "PUT /api/v1/keys/{key_id}/upstream-credentials/{provider}": {"key": "own-stolen-1"},
    "POST /api/v1/grants": {"budget": {"credits": "1"}, "expires_at": IN_AN_HOUR},
    "POST /api/v1/payments/intents": {"amount_usd_cents": 500},
    "POST /api/v1/payments/attempts/{attempt_id}/submit": {"tx_hash": "0x" + "ab" * 32},
    "POST /api/v1/operator/payments/claim": {
        "chain_id": 8453,
        "tx_hash": "0x" + "ab" * 32,
        "ordinal": 0,
        "account_id": "acct_" + "0" * 26,
        "note": "walked",
    },
    "POST /api/v1/operator/accounts": {"label": "walked"},
    "POST /api/v1/operator/accounts/{account_id}/freeze": {"reason": "walked"},
    "POST /api/v1/operator/accounts/{account_id}/thaw": {"reason": "walked"},
    "POST /api/v1/operator/accounts/{account_id}/grants": {
        "credits": "5",
        "reference": "walked",
        "note": "walked",
    },
}
# A provider that takes credentials of keys; nobody calls it.
ELSEWHERE = """
[providers.elsewhere]
kind = "openai"
base_url = "http://127.0.0.1:9/v1"

[chain]
token = "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913"
treasury = "0x8ba1f109551bD432803012645Ac136ddd64DBA72"
development = true
"""
# Sessions end by these: the walk would lose its own.
ENDS_SESSIONS = {"POST /api/v1/auth/logout", "POST /api/v1/auth/logout-all"}
SAFE = ("GET", "HEAD", "OPTIONS")
ID = re.compile(r"\b(?:key|grant|acct|pay)_[0-9a-z]{26}\b")


class Route(Struct, frozen=True):
    """One operation of the document, and what its document says of who may call it."""

    name: str
    method: str
    path: str
    kinds: frozenset[str]


class House(Struct):
    """A demo, two people and everything that one of them has."""

    demo: Running
    routes: list[Route]
    alice: Visitor
    mallory: Visitor
    alice_key: str
    mallory_key: str
    ids: dict[str, str]
    dead: dict[str, str]
    operator: str


def routes_of(document: dict[str, Any]) -> list[Route]:
    return [
        Route(
            f"{method.upper()} {path}",
            method.upper(),
            path,
            frozenset(kind for one in operation["security"] for kind in one),
        )
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("walk")
    config = folder / "farebox.toml"
    config.write_text(DEMO_CONFIG.read_text() + ELSEWHERE)
    node = {"FAREBOX_CHAIN__RPC_URLS": "http://127.0.0.1:9"}
    with running_demo(folder, "--workers", "2", "--config", str(config), **node) as demo:
        yield demo


@pytest.fixture
async def house(demo: Running) -> AsyncIterator[House]:
    async with AsyncExitStack() as stack:
        alice = await stack.enter_async_context(visiting(demo.origin))
        mallory = await stack.enter_async_context(visiting(demo.origin))
        for visitor in (alice, mallory):
            answer = await visitor.sign_in(KeyWallet())
            assert answer.status_code == 200, answer.text
        yield await furnished(demo, alice, mallory)


async def furnished(demo: Running, alice: Visitor, mallory: Visitor) -> House:
    document = (await alice.client.get("/openapi.json")).json()
    account_id = (await alice.session()).json()["account_id"]
    key = await made(alice, "/api/v1/keys", {"name": "hers"})
    grant = await made(alice, "/api/v1/grants", BODIES["POST /api/v1/grants"])
    put = f"/api/v1/keys/{key['id']}/upstream-credentials/elsewhere"
    assert (await alice.client.put(put, json={"key": "own-of-alice"})).status_code == 200
    soon = (datetime.now(UTC) + timedelta(seconds=0.3)).isoformat()
    expired = await made(alice, "/api/v1/keys", {"name": "short", "expires_at": soon})
    revoked = await made(alice, "/api/v1/keys", {"name": "gone"})
    assert (await alice.client.delete(f"/api/v1/keys/{revoked['id']}")).status_code == 200
    theirs = await made(mallory, "/api/v1/keys", {"name": "theirs"})
    await ended(alice, expired["key"])
    intent = await made(alice, "/api/v1/payments/intents", {"amount_usd_cents": 500})
    ids = {"key_id": key["id"], "grant_id": grant["id"], "account_id": account_id}
    ids["attempt_id"] = intent["attempt_id"]
    return House(
        demo=demo,
        routes=routes_of(document),
        alice=alice,
        mallory=mallory,
        alice_key=key["key"],
        mallory_key=theirs["key"],
        ids={**ids, "provider": "elsewhere", "id": "echo"},
        dead={
            "an unknown key": generate("test").secret,
            "a live key here": generate("live").secret,
            "no key at all": "sk-1234567890",
            "an expired key": expired["key"],
            "a revoked key": revoked["key"],
            "an unknown operator": generate("op").secret,
        },
        operator=str(demo.facts["operator_key"]),
    )


async def made(visitor: Visitor, path: str, body: Any) -> dict[str, Any]:
    answer = await visitor.client.post(path, json=body)
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def ended(visitor: Visitor, key: str) -> None:
    """Wait until a key has expired."""
    headers = {"authorization": f"Bearer {key}"}

    async def is_out() -> bool | None:
        answer = await visitor.client.get("/v1/models", headers=headers)
        return True if answer.status_code == 401 else None

    await eventually(is_out)


def place(route: Route, ids: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: ids[found[1]], route.path)


async def ask(
    house: House, route: Route, client: httpx.AsyncClient, bearer: str = "", **headers: str
) -> httpx.Response:
    sent = {**headers, **({"authorization": f"Bearer {bearer}"} if bearer else {})}
    path = place(route, house.ids)
    return await client.request(route.method, path, json=BODIES.get(route.name), headers=sent)


def code_of(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


async def test_nobody_gets_in_without_a_credential_that_lives(house: House) -> None:
    private = [route for route in house.routes if route.kinds]
    assert len(private) >= 25
    async with httpx.AsyncClient(base_url=house.demo.origin, timeout=20) as stranger:
        for route in private:
            answer = await ask(house, route, stranger)
            assert answer.status_code == 401, route.name
            assert "www-authenticate" in answer.headers, route.name
            for who, key in house.dead.items():
                answer = await ask(house, route, stranger, key)
                assert answer.status_code == 401, f"{route.name} with {who}: {answer.text}"
            dead_cookie = {"cookie": "farebox=" + "A" * 43, "origin": house.demo.origin}
            answer = await ask(house, route, stranger, "", **dead_cookie)
            assert answer.status_code == 401, route.name


async def test_keys_and_operators_keep_to_their_own_routes(house: House) -> None:
    async with httpx.AsyncClient(base_url=house.demo.origin, timeout=20) as stranger:
        for route in house.routes:
            if not route.kinds:
                continue
            by_key = await ask(house, route, stranger, house.mallory_key)
            by_operator = await ask(house, route, stranger, house.operator)
            if "operator_key" in route.kinds:
                assert by_key.status_code == 401, route.name
            else:
                assert by_operator.status_code == 401, route.name
            if route.kinds == {"session"}:
                assert (by_key.status_code, code_of(by_key)) == (403, "session_required")


async def test_a_session_changes_nothing_from_a_foreign_page(house: House) -> None:
    origins = ("", "null", "https://evil.example", house.demo.origin + ".evil.example")
    cookies = "; ".join(f"{c.name}={c.value}" for c in house.alice.client.cookies.jar)
    before = await belongings(house.alice)
    async with httpx.AsyncClient(base_url=house.demo.origin, timeout=20) as browser:
        for route in house.routes:
            if "session" not in route.kinds or route.method in SAFE:
                continue
            for origin in origins:
                headers = {"cookie": cookies, **({"origin": origin} if origin else {})}
                answer = await ask(house, route, browser, "", **headers)
                assert (answer.status_code, code_of(answer)) == (403, "origin_mismatch"), route.name

    assert await belongings(house.alice) == before


async def belongings(visitor: Visitor) -> list[Any]:
    """Everything that somebody can see of their own."""
    paths = ("keys", "grants", "credits", "auth/session", "payments/attempts")
    answers = [await visitor.client.get(f"/api/v1/{path}") for path in paths]
    assert [answer.status_code for answer in answers] == [200] * len(paths)
    return [answer.json() for answer in answers]


async def test_nothing_of_another_tenant_can_be_read_or_changed(house: House) -> None:
    before = await belongings(house.alice)
    hers = set(ID.findall(str(before)))
    assert len(hers) >= 4
    tried = 0
    for route in house.routes:
        if "operator_key" in route.kinds or route.name in ENDS_SESSIONS:
            continue
        by_session = await ask(house, route, house.mallory.client)
        async with httpx.AsyncClient(base_url=house.demo.origin, timeout=20) as client:
            by_key = await ask(house, route, client, house.mallory_key)
        for answer in (by_session, by_key):
            assert not hers & set(ID.findall(answer.text)), route.name
            assert "own-of-alice" not in answer.text
        if {"{key_id}", "{grant_id}", "{attempt_id}"} & set(re.findall(r"\{\w+\}", route.path)):
            tried += 1
            assert by_session.status_code == 404, f"{route.name}: {by_session.text}"
    # Cursors are no way around it.
    for path in ("keys", "grants", "payments/attempts"):
        for cursor in hers:
            answer = await house.mallory.client.get(f"/api/v1/{path}", params={"cursor": cursor})
            assert not hers & set(ID.findall(answer.text)), answer.text

    assert tried >= 10
    assert await belongings(house.alice) == before


async def test_every_route_that_takes_a_body_was_given_one(house: House) -> None:
    document = (await house.alice.client.get("/openapi.json")).json()
    wanted = {
        f"{method.upper()} {path}"
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if "requestBody" in operation and operation["security"]
    }

    assert wanted == set(BODIES)


async def test_a_revoked_key_is_out_on_every_worker_within_five_seconds(house: House) -> None:
    key = await made(house.mallory, "/api/v1/keys", {"name": "soon gone"})
    headers = {"authorization": f"Bearer {key['key']}", "connection": "close"}

    async def statuses() -> set[int]:
        """Of many connections, so that both workers are among them."""
        async with httpx.AsyncClient(base_url=house.demo.origin, timeout=20) as client:
            calls = [client.get("/v1/models", headers=headers) for _ in range(24)]
            return {answer.status_code for answer in await asyncio.gather(*calls)}

    assert await statuses() == {200}
    assert (await house.mallory.client.delete(f"/api/v1/keys/{key['id']}")).status_code == 200
    until = asyncio.get_running_loop().time() + 5
    while asyncio.get_running_loop().time() < until:
        # A worker that is asked again and again must not keep the key alive.
        await statuses()

    for _ in range(3):
        assert await statuses() == {401}


async def test_a_wallet_gets_a_key_spends_with_an_sdk_and_revokes_it(demo: Running) -> None:
    async with visiting(demo.origin) as visitor, httpx.AsyncClient(base_url=demo.origin) as plain:
        assert (await visitor.sign_in(KeyWallet())).status_code == 200
        account_id = (await visitor.session()).json()["account_id"]
        wish = {"name": "mine", "budget": {"credits": "900", "window": "day"}}
        key = await made(visitor, "/api/v1/keys", wish)
        granted = await plain.post(
            f"/api/v1/operator/accounts/{account_id}/grants",
            json={"credits": "1000", "reference": f"for {account_id}", "note": "to try"},
            headers={"authorization": f"Bearer {demo.facts['operator_key']}"},
        )
        assert granted.status_code in (200, 201), granted.text
        async with AsyncOpenAI(base_url=demo.base_url, api_key=key["key"], max_retries=0) as sdk:
            answer = await sdk.chat.completions.create(
                model="local-priced", messages=[{"role": "user", "content": "hello"}]
            )
            cost = Decimal(str(answer.usage.cost))  # type: ignore[union-attr]

            async def spent() -> dict[str, Any] | None:
                headers = {"authorization": f"Bearer {key['key']}"}
                shown = (await plain.get("/api/v1/key", headers=headers)).json()["data"]
                return shown if shown["usage"] else None

            shown = await eventually(spent)
            assert Decimal(str(shown["usage_daily"])) == Decimal(str(shown["usage"])) == cost > 0
            assert Decimal(str(shown["limit_remaining"])) == Decimal("0.9") - cost
            assert (await visitor.client.delete(f"/api/v1/keys/{key['id']}")).status_code == 200
            with pytest.raises(AuthenticationError):
                await sdk.chat.completions.create(
                    model="local-priced", messages=[{"role": "user", "content": "hello"}]
                )
