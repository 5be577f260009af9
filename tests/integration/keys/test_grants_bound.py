"""How many grants an account may have, whoever asks at once."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from billing import book
from keys import grants_store
from keys.errors import TooManyGrants
from keys.grants_store import GrantTerms
from tests.support.gateway import PEPPER, Gateway, make_settings, running_gateway
from tests.support.people import signed_in
from tests.support.upstream.launch import Upstream

AN_HOUR_LATER = "UPDATE app_api_keys SET created_at = created_at - interval '1 hour'"


def wish() -> dict[str, Any]:
    expires_at = datetime.now(UTC) + timedelta(hours=1)
    return {"budget": {"credits": "25"}, "expires_at": expires_at.isoformat()}


@pytest.fixture
async def narrow(book_url: str, till_url: str, upstream: Upstream) -> AsyncIterator[Gateway]:
    settings = make_settings(upstream.base_url, limits__open_grants_per_account=3)
    async with running_gateway(book_url, till_url, upstream.base_url, settings) as gateway:
        yield gateway


async def test_open_grants_of_an_account_are_bounded_whoever_asks_at_once(narrow: Gateway) -> None:
    async with signed_in(narrow) as alice, signed_in(narrow) as bob:
        answers = await asyncio.gather(*(alice.ask("POST", "/grants", wish()) for _ in range(10)))
        made = [answer.json() for answer in answers if answer.status_code == 201]
        refused = [answer.json()["error"] for answer in answers if answer.status_code == 409]

        assert (len(made), len(refused)) == (3, 7)
        assert {error["code"] for error in refused} == {"too_many_grants"}
        await bob.post("/grants", wish(), 201)
        await alice.delete(f"/grants/{made[0]['id']}")
        # Neither revoking nor an end makes room at once: minting for ever would fill the book.
        await alice.post("/grants", wish(), 409)
        await narrow.tamper(AN_HOUR_LATER)
        await alice.post("/grants", wish(), 201)
        await alice.post("/grants", wish(), 409)
        await narrow.tamper("UPDATE app_api_keys SET expires_at = now()")
        await narrow.tamper(AN_HOUR_LATER)
        await alice.post("/grants", wish(), 201)


async def test_the_bound_holds_in_the_store_as_well(gateway: Gateway) -> None:
    account_id = await gateway.account()
    terms = GrantTerms(
        name="x", expires_at=datetime.now(UTC) + timedelta(hours=1), budget_nanos=1, run_id="r"
    )
    async with book.acquire(gateway.pool) as conn:
        record, new = await grants_store.create_grant(
            conn, account_id, terms, pepper=PEPPER.encode(), open_max=1
        )
        with pytest.raises(TooManyGrants):
            await grants_store.create_grant(
                conn, account_id, terms, pepper=PEPPER.encode(), open_max=1
            )

        assert await grants_store.owner_of_grant(conn, record.id) == account_id
        assert new.secret not in repr(record)
