"""With the account taken out of every statement, tenants still do not reach each other."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from billing import payment_attempts, spend
from gateway.api.tenant import tenant
from keys import grants_store, keys_store, upstream_store
from tests.support.gateway import Gateway
from tests.support.people import Person

pytestmark = pytest.mark.asyncio(loop_scope="module")

FILTER = re.compile(r"(?:\w+\.)?billing_account_id = (\$\d)(?:::uuid)?")
WAYS: tuple[tuple[str, str, Any], ...] = (
    ("GET", "", None),
    ("PATCH", "", {"name": "stolen"}),
    ("POST", "/rotate", {}),
)
GONE = ("DELETE", "", None)


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch) -> int:
    """A build whose statements forgot for whom they are asked; how many there are."""
    forgotten = 0
    for module in (keys_store, spend, grants_store, upstream_store, payment_attempts):
        for name, text in vars(module).items():
            if name.isupper() and isinstance(text, str) and FILTER.search(text):
                monkeypatch.setattr(module, name, FILTER.sub(r"\1::uuid IS NOT NULL", text))
                forgotten += 1
    return forgotten


async def test_without_any_filter_another_accounts_keys_are_still_not_there(
    gateway: Gateway, alice: Person, bob: Person, careless: int
) -> None:
    theirs, own = await alice.new_key(), await bob.new_key()

    answers = [
        await bob.ask(method, f"/keys/{theirs['id']}{path}", body)
        for method, path, body in (*WAYS, GONE)
    ]

    assert careless >= 14
    assert [answer.status_code for answer in answers] == [404] * 4
    assert [key["id"] for key in (await bob.get("/keys"))["data"]] == [own["id"]]
    (kept,) = (await alice.get("/keys"))["data"]
    assert (kept["id"], kept["name"], kept["status"]) == (theirs["id"], "test", "active")


async def test_without_any_filter_nothing_else_of_another_account_is_there(
    gateway: Gateway, alice: Person, bob: Person, careless: int
) -> None:
    in_an_hour = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    wish = {"budget": {"credits": "1"}, "expires_at": in_an_hour}
    key, grant = await alice.new_key(), await alice.post("/grants", wish, 201)
    attempt = await alice.post("/payments/intents", {"amount_usd_cents": 500}, 201)
    attempt_id, credentials = attempt["attempt_id"], f"/keys/{key['id']}/upstream-credentials"
    tried: tuple[tuple[str, str, Any], ...] = (
        ("GET", f"/grants/{grant['id']}", None),
        ("DELETE", f"/grants/{grant['id']}", None),
        ("GET", f"/payments/attempts/{attempt_id}", None),
        ("POST", f"/payments/attempts/{attempt_id}/submit", {"tx_hash": "0x" + "ab" * 32}),
        ("GET", credentials, None),
        ("GET", f"{credentials}/zoo", None),
        ("DELETE", f"{credentials}/zoo", None),
    )

    answers = [await bob.ask(method, path, body) for method, path, body in tried]

    assert [answer.status_code for answer in answers] == [404] * len(tried)
    assert (await bob.get("/grants"))["data"] == (await bob.get("/payments/attempts"))["data"] == []
    assert (await alice.get(f"/grants/{grant['id']}"))["status"] == "active"
    assert (await alice.get(f"/payments/attempts/{attempt_id}"))["tx_hash"] is None


async def test_it_is_the_wall_that_holds_there_and_nothing_else(
    gateway: Gateway, alice: Person, bob: Person, careless: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = await alice.new_key()
    monkeypatch.setattr(gateway.services, "request_pool", gateway.pool)

    answers = [
        await bob.ask(method, f"/keys/{theirs['id']}{path}", body) for method, path, body in WAYS
    ]

    assert [answer.status_code for answer in answers] == [200] * 3


async def test_the_routes_of_a_tenant_enter_as_the_role_of_tenants(
    gateway: Gateway, alice: Person
) -> None:
    async with tenant(gateway.services, alice.account_id) as conn:
        row = await conn.fetchrow("SELECT current_user::text AS role, count(*) FROM users")

    assert row is not None
    assert (row["role"], row["count"]) == ("farebox_request", 1)
