"""`/api/v1/grants` over HTTP on a running gateway: minted, used, seen, revoked, and by whom."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest

from billing.money import credits_text
from config.ids import id_text, new_id, read_id
from tests.support.gateway import Gateway, eventually
from tests.support.people import Person, calling

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}
RUN = {"run_id": "run-7", "graph_id": "graph \u2192 b"}


def soon(**more: int) -> str:
    return (datetime.now(UTC) + timedelta(**(more or {"hours": 1}))).isoformat(timespec="seconds")


def wish(**more: Any) -> dict[str, Any]:
    return {"budget": {"credits": "25"}, "expires_at": soon(), **more}


async def infer(
    gateway: Gateway, key: str, headers: dict[str, str] | None = None, **more: Any
) -> httpx.Response:
    authorization = {"authorization": f"Bearer {key}", **(headers or {})}
    async with httpx.AsyncClient(headers=authorization, timeout=30) as client:
        return await client.post(gateway.base_url + "/chat/completions", json={**HELLO, **more})


async def receipts_of(gateway: Gateway, account_id: UUID, count: int) -> list[dict[str, Any]]:
    """All columns of all receipts of an account, oldest first."""
    await gateway.at_rest()
    query = "SELECT * FROM charge_receipts WHERE billing_account_id = $1 ORDER BY request_id"
    rows = await gateway.pool.fetch(query, account_id)
    assert len(rows) == count
    return [dict(row) for row in rows]


async def keys_of(gateway: Gateway, account_id: UUID) -> int:
    """How many keys of any kind an account has."""
    query = "SELECT count(*) FROM app_api_keys WHERE billing_account_id = $1"
    return int(await gateway.pool.fetchval(query, account_id))


async def test_a_grant_spends_from_its_account_and_names_its_run(
    gateway: Gateway, alice: Person
) -> None:
    made = await alice.post("/grants", wish(name="night job", models=["plain"], **RUN), 201)
    secret = made.pop("key")
    answer = await infer(gateway, secret)
    (receipt,) = await receipts_of(gateway, alice.account_id, 1)
    seen = await alice.get(f"/grants/{made['id']}")

    assert answer.status_code == 200
    assert secret.startswith("fb_test_")
    assert made["hint"] == f"{secret[:12]}...{secret[-4:]}"
    assert (made["object"], made["status"], made["name"]) == ("grant", "active", "night job")
    assert made["budget"]["credits"] == made["budget"]["remaining"]["credits"] == "25"
    assert {name: made[name] for name in RUN} == RUN
    assert receipt["billing_account_id"] == alice.account_id
    assert receipt["app_key_id"] == read_id(made["id"])
    assert {name: receipt[name] for name in RUN} == RUN
    assert secret not in str(seen)
    assert (await alice.get("/grants"))["data"] == [seen]


async def test_the_virtual_key_of_a_grant_has_its_budget_for_all_of_its_life(
    gateway: Gateway, alice: Person
) -> None:
    first = await alice.post("/grants", wish(), 201)
    await alice.post("/grants", wish(budget={"credits": "0.000001"}), 201)

    rows = await gateway.pool.fetch(
        "SELECT v.budget_nanos, v.budget_window, v.is_default, k.scopes, k.kind"
        " FROM app_api_keys AS k JOIN virtual_keys AS v ON v.id = k.virtual_key_id"
        " WHERE k.billing_account_id = $1 ORDER BY k.id",
        alice.account_id,
    )
    assert [row["budget_nanos"] for row in rows] == [25_000_000, 1]
    for row in rows:
        kept = (row["budget_window"], row["is_default"], row["scopes"], row["kind"])
        assert kept == ("total", False, ["infer"], "grant")
    assert first["budget"]["window"] == "total"


async def test_a_grant_never_spends_above_its_budget_whatever_runs_at_once(
    gateway: Gateway, alice: Person
) -> None:
    """A call costs some 0.25 credits, and holds 4 for its 500 tokens of output."""
    made = await alice.post("/grants", wish(budget={"credits": "9"}), 201)
    answers = await asyncio.gather(*(infer(gateway, made["key"]) for _ in range(30)))
    refused = [a.json()["error"] for a in answers if a.status_code == 402]
    rows = await receipts_of(gateway, alice.account_id, 30 - len(refused))
    budget = (await alice.get(f"/grants/{made['id']}"))["budget"]

    assert {answer.status_code for answer in answers} == {200, 402}
    assert {error["code"] for error in refused} == {"key_limit_reached"}
    spent = sum(row["price_nanos"] for row in rows)
    assert 0 < spent <= 9_000_000
    assert budget["spent"]["credits"] == credits_text(spent)
    assert budget["remaining"]["credits"] == credits_text(9_000_000 - spent)


async def test_no_request_names_its_own_run(gateway: Gateway, alice: Person) -> None:
    """Neither headers nor the body of a key without a run, nor of a grant of another run."""
    headers = {
        **{"x-run-id": "forged", "run-id": "forged", "x-graph-id": "forged"},
        **{"x-farebox-run-id": "forged", "x-request-id": "label"},
    }
    body: dict[str, Any] = {"run_id": "forged", "graph_id": "forged"}
    body["metadata"] = {"run_id": "forged", "graph_id": "forged"}
    granted = (await alice.post("/grants", wish(run_id="mine"), 201))["key"]
    plain = await gateway.key(alice.account_id)
    for key in (plain, granted):
        for stream in (False, True):
            assert (await infer(gateway, key, headers, **body, stream=stream)).status_code == 200

    runs = [
        (row["run_id"], row["graph_id"]) for row in await receipts_of(gateway, alice.account_id, 4)
    ]
    assert runs == [("", ""), ("", ""), ("mine", ""), ("mine", "")]


async def test_a_revoked_grant_is_refused_at_once(gateway: Gateway, alice: Person) -> None:
    made = await alice.post("/grants", wish(), 201)
    assert (await infer(gateway, made["key"])).status_code == 200
    revoked = await alice.delete(f"/grants/{made['id']}")
    answer = await infer(gateway, made["key"])

    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert revoked["status"] == "revoked"
    assert await alice.delete(f"/grants/{made['id']}") == revoked


async def test_a_grant_ends_by_itself(gateway: Gateway, alice: Person) -> None:
    ends_at = (datetime.now(UTC) + timedelta(seconds=0.5)).isoformat()
    made = await alice.post("/grants", wish(expires_at=ends_at), 201)

    async def expired() -> str | None:
        answer = await infer(gateway, made["key"])
        return answer.json()["error"]["code"] if answer.status_code == 401 else None

    assert await eventually(expired) == "key_expired"
    assert (await alice.get(f"/grants/{made['id']}"))["status"] == "expired"


async def test_grants_and_keys_mint_no_grants_and_manage_nothing(
    gateway: Gateway, alice: Person
) -> None:
    made = await alice.post("/grants", wish(), 201)
    for bearer in (made["key"], await gateway.key(alice.account_id)):
        async with calling(gateway, bearer) as holder:
            for method, path in [
                ("POST", "/grants"),
                ("GET", "/grants"),
                ("GET", f"/grants/{made['id']}"),
                ("DELETE", f"/grants/{made['id']}"),
                ("GET", f"/keys/{made['id']}/upstream-credentials"),
                ("PUT", f"/keys/{made['id']}/upstream-credentials/zoo"),
            ]:
                answer = await holder.ask(method, path, wish())
                assert (answer.status_code, answer.json()["error"]["code"]) == (
                    403,
                    "session_required",
                )
    assert await keys_of(gateway, alice.account_id) == 2


async def test_another_account_sees_and_revokes_nothing(
    gateway: Gateway, alice: Person, bob: Person
) -> None:
    made = await alice.post("/grants", wish(), 201)
    as_key = made["id"].replace("grant_", "key_")
    for grant_id in (made["id"], f"grant_{id_text(new_id())}", as_key, "x"):
        assert (await bob.get(f"/grants/{grant_id}", 404))["code"] == "not_found"
        assert (await bob.delete(f"/grants/{grant_id}", 404))["code"] == "not_found"

    assert (await bob.get("/grants"))["data"] == []
    assert (await alice.get(f"/grants/{made['id']}"))["status"] == "active"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"expires_at": soon(days=31)}, "expires_at"),
    ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
    ({"expires_at": "2027-01-01T00:00:00"}, "expires_at"),
    ({"expires_at": None}, "expires_at"),
    ({"budget": None}, "budget"),
    ({"budget": {"credits": "0"}}, "budget.credits"),
    ({"budget": {"credits": "-1"}}, "budget.credits"),
    ({"budget": {"credits": "1e3"}}, "budget.credits"),
    ({"budget": {"credits": "0.0000001"}}, "budget.credits"),
    ({"budget": {"credits": "9007199255"}}, "budget.credits"),
    ({"budget": {"credits": 5}}, "budget.credits"),
    ({"budget": {"credits": "5", "window": "day"}}, "budget.window"),
    ({"models": []}, "models"),
    ({"models": ["plain", "nothing"]}, "models[1]"),
    ({"run_id": ""}, "run_id"),
    ({"run_id": "a" * 201}, "run_id"),
    ({"graph_id": "a\u0000b"}, "graph_id"),
    ({"graph_id": "a\nb"}, "graph_id"),
    ({"scopes": ["payments"]}, "scopes"),
    ({"account_id": "acct_other"}, "account_id"),
]


async def test_what_no_grant_may_be_is_refused(gateway: Gateway, alice: Person) -> None:
    for change, param in REFUSED:
        error = await alice.post("/grants", wish(**change), 400)
        assert (error["code"], error["param"]) == ("invalid_request", param), change
    for missing in ("budget", "expires_at"):
        asked = wish()
        del asked[missing]
        assert (await alice.post("/grants", asked, 400))["param"] == missing

    assert await keys_of(gateway, alice.account_id) == 0


async def test_grants_come_in_pages(alice: Person) -> None:
    ids = [(await alice.post("/grants", wish(), 201))["id"] for _ in range(5)]
    first = await alice.get("/grants?limit=2")
    rest = await alice.get(f"/grants?limit=3&cursor={first['next_cursor']}")

    assert [one["id"] for one in first["data"] + rest["data"]] == ids[::-1]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert (await alice.get("/grants?cursor=nonsense", 400))["param"] == "cursor"
