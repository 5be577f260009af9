"""With the account taken out of every statement, tenants still do not reach each other."""

import re
from typing import Any

import pytest

from billing import spend
from gateway.api.tenant import tenant
from keys import keys_store
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
    for module in (keys_store, spend):
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

    assert careless >= 8
    assert [answer.status_code for answer in answers] == [404] * 4
    assert [key["id"] for key in (await bob.get("/keys"))["data"]] == [own["id"]]
    (kept,) = (await alice.get("/keys"))["data"]
    assert (kept["id"], kept["name"], kept["status"]) == (theirs["id"], "test", "active")


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
