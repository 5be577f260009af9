"""`/api/v1/key` and `/api/v1/credits`: OpenRouter's names, and amounts that agree with the book."""

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest

from billing.till_scopes import account_scope_key
from billing.windows import window_start
from config.ids import id_text
from tests.support.gateway import Gateway
from tests.support.people import Person, calling, note_spend

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}
OPENROUTER = {
    *("label", "limit", "limit_remaining", "limit_reset", "include_byok_in_limit", "usage"),
    *("usage_daily", "usage_weekly", "usage_monthly", "byok_usage", "byok_usage_daily"),
    *("byok_usage_weekly", "byok_usage_monthly", "is_free_tier", "is_management_key"),
    *("is_provisioning_key", "creator_user_id", "expires_at", "rate_limit"),
}


def exactly(answer: httpx.Response) -> dict[str, Any]:
    """The data with its numbers as they were written."""
    assert answer.status_code == 200, answer.text
    data: dict[str, Any] = json.loads(answer.text, parse_float=Decimal)["data"]
    return data


async def test_the_calling_key_has_openrouters_fields(gateway: Gateway, alice: Person) -> None:
    made = await alice.new_key(name="bot", rpm=30)
    async with calling(gateway, made["key"]) as key:
        data = exactly(await key.ask("GET", "/key"))

    assert data.keys() >= OPENROUTER
    assert (data["label"], data["name"], data["id"]) == (made["hint"], "bot", made["id"])
    assert data["account_id"] == f"acct_{id_text(alice.account_id)}"
    assert data["rate_limit"]["requests"] == 30
    assert data["is_free_tier"] is False
    for name in ("limit", "limit_remaining", "limit_reset", "limit_resets_at", "expires_at"):
        assert data[name] is None
    assert data["usage"] == data["usage_daily"] == 0


@pytest.mark.parametrize(
    ("window", "reset", "spent"),
    [
        ("day", "daily", "usage_daily"),
        ("week", "weekly", "usage_weekly"),
        ("month", "monthly", "usage_monthly"),
        ("total", None, "usage"),
    ],
)
async def test_what_a_key_spent_is_summed_by_windows(
    gateway: Gateway, alice: Person, window: str, reset: str | None, spent: str
) -> None:
    """1 nano today, 10 more this week (if it has more days), 100 this month, 1,000 before."""
    made = await alice.new_key(budget={"credits": "1", "window": window})
    now = datetime.now(UTC)
    today = window_start("day", now)
    days: dict[datetime, int] = {}
    for start, nanos in (
        (today, 1),
        (window_start("week", now), 10),
        (window_start("month", now), 100),
        (today - timedelta(days=400), 1000),
    ):
        days[start] = days.get(start, 0) + nanos
    await note_spend(gateway, made["id"], days)
    async with calling(gateway, made["key"]) as key:
        data = exactly(await key.ask("GET", "/key"))

    starts = {
        "usage_daily": today,
        "usage_weekly": window_start("week", now),
        "usage_monthly": window_start("month", now),
    }
    for name, since in starts.items():
        nanos = sum(nanos for day, nanos in days.items() if day >= since)
        assert data[name] == Decimal(nanos).scaleb(-9), name
    assert data["usage"] == Decimal("0.000001111")
    assert (data["limit"], data["limit_reset"]) == (Decimal("0.001"), reset)
    assert data["limit_remaining"] == Decimal("0.001") - data[spent]
    assert (data["limit_resets_at"] is None) == (window == "total")


async def test_a_session_is_a_credential_without_a_key(alice: Person) -> None:
    data = exactly(await alice.ask("GET", "/key"))

    assert (data["label"], data["id"], data["limit"]) == ("session", None, None)


async def test_the_credits_agree_with_the_book_and_the_till(
    gateway: Gateway, alice: Person
) -> None:
    made = await alice.new_key()
    async with calling(gateway, made["key"]) as key:
        before = exactly(await key.ask("GET", "/credits"))
        headers = {"authorization": f"Bearer {made['key']}"}
        async with httpx.AsyncClient(headers=headers) as client:
            answer = await client.post(gateway.base_url + "/chat/completions", json=HELLO)
        receipt = await gateway.receipt(answer.headers["x-receipt-id"])
        await gateway.at_rest()
        after = exactly(await key.ask("GET", "/credits"))

    assert before["balance"] == before["available"] == {"credits": "1000", "usd": "1"}
    assert (before["total_credits"], before["total_usage"]) == (1, 0)
    assert receipt["price_nanos"] > 0
    left = 1 - Decimal(receipt["price_nanos"]).scaleb(-9)
    assert Decimal(after["balance"]["usd"]) == Decimal(after["available"]["usd"]) == left
    assert after["total_credits"] - after["total_usage"] == left
    assert after["held"] == after["pending"] == {"credits": "0", "usd": "0"}


async def test_what_is_held_and_pending_is_not_available(gateway: Gateway, alice: Person) -> None:
    scope = account_scope_key(alice.account_id)
    link = gateway.services.link
    await link.command(("HSET", scope, "held", 3_000_000, "uncommitted", 2_500_000))
    data = exactly(await alice.ask("GET", "/credits"))
    await link.command(("HDEL", scope, "held", "uncommitted"))

    amounts = {name: data[name]["credits"] for name in ("balance", "available", "held", "pending")}
    assert amounts == {"balance": "1000", "available": "994.5", "held": "3", "pending": "2.5"}


async def test_without_the_till_the_credits_say_what_the_book_knows(
    gateway: Gateway, alice: Person
) -> None:
    await gateway.services.link.close()
    data = exactly(await alice.ask("GET", "/credits"))
    gateway.services.link.start()
    await gateway.services.link.wait_up(5)

    assert data["balance"]["credits"] == "1000"
    assert data["available"] is data["held"] is data["pending"] is None


async def test_credits_need_the_permission_and_the_own_key_does_not(
    gateway: Gateway, alice: Person
) -> None:
    made = await alice.new_key(scopes=["infer"])
    async with calling(gateway, made["key"]) as key:
        error = (await key.ask("GET", "/credits")).json()["error"]
        assert (await key.ask("GET", "/key")).status_code == 200

    assert error["code"] == "permission_missing"
