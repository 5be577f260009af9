"""`/api/v1/operator`: what operators may do, what they may not, and that nobody else may."""

import asyncio
from typing import Any
from uuid import UUID

import httpx
import pytest

from billing.till_scopes import account_scope_key
from config.ids import id_text, new_id, read_id
from gateway import operators
from keys import store
from keys.api_key import generate
from tests.support.gateway import Gateway, eventually
from tests.support.people import Person, calling

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}


async def infer(gateway: Gateway, key: str) -> httpx.Response:
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {key}"}) as client:
        return await client.post(gateway.base_url + "/chat/completions", json=HELLO)


def path_of(person: Person, more: str = "") -> str:
    return f"/operator/accounts/acct_{id_text(person.account_id)}{more}"


async def test_an_operator_makes_an_account_and_gives_it_credit(operator: Person) -> None:
    made = await operator.post("/operator/accounts", {"label": "Caf\u00e9"}, 201)
    path = f"/operator/accounts/{made['id']}"
    wish = {"credits": "12.5", "reference": f"g-{made['id']}", "note": "welcome"}
    granted = await operator.post(f"{path}/grants", wish, 201)
    again = await operator.post(f"{path}/grants", wish, 201)
    conflict = await operator.post(f"{path}/grants", {**wish, "credits": "13"}, 409)
    read = await operator.get(path)

    assert (made["object"], made["label"], made["status"]) == ("account", "Caf\u00e9", "active")
    assert made["balance"] == {"credits": "0", "usd": "0"}
    assert granted == again
    assert granted["balance"] == granted["granted"] == {"credits": "12.5", "usd": "0.0125"}
    assert conflict["code"] == "conflict"
    assert read["credits"]["available"]["credits"] == "12.5"
    assert read["credits"]["total_credits"] == 0.0125


async def test_a_grant_is_known_to_a_warm_till(
    gateway: Gateway, alice: Person, operator: Person
) -> None:
    key = (await alice.new_key())["key"]
    assert (await infer(gateway, key)).status_code == 200
    wish = {"credits": "500", "reference": f"warm-{new_id()}", "note": "more"}
    granted = await operator.post(path_of(alice, "/grants"), wish, 201)
    await gateway.at_rest()

    posted = await gateway.services.link.command(
        ("HGET", account_scope_key(alice.account_id), "posted")
    )
    assert int(posted) > 1_400_000_000
    assert float(granted["balance"]["credits"]) > 1400


async def test_a_frozen_account_is_refused_at_once_and_thawed_at_once(
    gateway: Gateway, alice: Person, operator: Person
) -> None:
    key = (await alice.new_key())["key"]
    assert (await infer(gateway, key)).status_code == 200
    frozen = await operator.post(path_of(alice, "/freeze"), {"reason": "fraud"})
    refused = await infer(gateway, key)
    again = await operator.post(path_of(alice, "/freeze"), {"reason": "other"})
    thawed = await operator.post(path_of(alice, "/thaw"), {"reason": "mistake"})

    async def served() -> bool | None:
        return (await infer(gateway, key)).status_code == 200 or None

    await eventually(served, 5)
    assert (frozen["status"], frozen["status_reason"]) == ("frozen", "fraud")
    assert frozen["status_changed_at"] is not None
    assert again == frozen
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "account_frozen"
    assert (thawed["status"], thawed["status_reason"]) == ("active", "mistake")


async def test_a_cold_till_learns_of_a_freeze_from_the_book(
    gateway: Gateway, alice: Person, operator: Person
) -> None:
    key = (await alice.new_key())["key"]
    await gateway.services.link.command(("DEL", account_scope_key(alice.account_id)))
    await operator.post(path_of(alice, "/freeze"), {"reason": "fraud"})

    assert (await infer(gateway, key)).status_code == 403


async def test_a_freeze_holds_although_the_till_is_away(
    gateway: Gateway, alice: Person, operator: Person, caplog: pytest.LogCaptureFixture
) -> None:
    key = (await alice.new_key())["key"]
    assert (await infer(gateway, key)).status_code == 200
    await gateway.at_rest()
    await gateway.services.link.close()
    await operator.post(path_of(alice, "/freeze"), {"reason": "fraud"})
    gateway.services.link.start()
    await gateway.services.link.wait_up(5)

    async def refused() -> bool | None:
        return (await infer(gateway, key)).status_code == 403 or None

    await eventually(refused, 5)
    assert "account.till_untold" in caplog.text


async def test_an_operator_revokes_a_key_of_any_account(
    gateway: Gateway, alice: Person, operator: Person
) -> None:
    made = await alice.new_key()
    assert (await infer(gateway, made["key"])).status_code == 200
    listed = await operator.get(path_of(alice, "/keys"))
    gone = await operator.delete(f"/operator/keys/{made['id']}")

    assert (await infer(gateway, made["key"])).status_code == 401
    assert [key["id"] for key in listed["data"]] == [made["id"]]
    assert made["key"] not in str(listed)
    assert gone["status"] == "revoked"
    assert await alice.get(f"/keys/{made['id']}") == gone


async def test_accounts_are_listed_in_pages_newest_first(
    alice: Person, bob: Person, operator: Person
) -> None:
    first = await operator.get("/operator/accounts?limit=1")
    second = await operator.get(f"/operator/accounts?limit=1&cursor={first['next_cursor']}")

    (newest,), (before,) = first["data"], second["data"]
    assert [newest["id"], before["id"]] == [
        f"acct_{id_text(person.account_id)}" for person in (bob, alice)
    ]
    assert first["has_more"]


ROUTES: list[tuple[str, str, dict[str, Any] | None]] = [
    ("GET", "/operator/accounts", None),
    ("POST", "/operator/accounts", {"label": "x"}),
    ("GET", "{account}", None),
    ("POST", "{account}/freeze", {"reason": "x"}),
    ("POST", "{account}/thaw", {"reason": "x"}),
    ("POST", "{account}/grants", {"credits": "1", "reference": "r", "note": "n"}),
    ("GET", "{account}/keys", None),
    ("DELETE", "/operator/keys/{key}", None),
]


async def test_nobody_but_an_operator_operates(gateway: Gateway, alice: Person) -> None:
    made = await alice.new_key(scopes=["infer", "account", "payments"])
    async with calling(gateway, made["key"]) as key, calling(gateway, "") as nobody:
        for person in (alice, key, nobody):
            for method, template, body in ROUTES:
                path = template.format(account=path_of(alice), key=made["id"])
                answer = await person.ask(method, path, body)
                assert answer.status_code == 401, (method, path)
                assert answer.json()["error"]["code"] == "invalid_api_key"
    assert (await alice.get(f"/keys/{made['id']}"))["status"] == "active"


async def test_operators_neither_infer_nor_have_an_account(
    gateway: Gateway, operator: Person
) -> None:
    bearer = operator.client.headers["authorization"].removeprefix("Bearer ")
    assert (await infer(gateway, bearer)).status_code == 401
    for method, path in (("GET", "/key"), ("GET", "/credits"), ("GET", "/keys"), ("POST", "/keys")):
        answer = await operator.ask(method, path, {"name": "x"} if method == "POST" else None)
        assert answer.status_code == 401


@pytest.mark.parametrize("ending", ["revoked_at = now()", "expires_at = now()"])
async def test_an_operator_key_ends_at_once(
    gateway: Gateway, operator: Person, ending: str
) -> None:
    bearer = operator.client.headers["authorization"]
    await operator.get("/operator/accounts")
    await gateway.tamper(
        f"UPDATE operator_keys SET {ending} WHERE last4 = $1",  # noqa: S608 - our own words
        bearer[-4:],
    )

    error = await operator.ask("GET", "/operator/accounts")
    assert error.status_code == 401


async def test_accounts_and_keys_that_are_not_there_are_told_apart_by_nothing(
    alice: Person, operator: Person
) -> None:
    made = await alice.new_key()
    for account in (f"acct_{id_text(new_id())}", "acct_x", "x", made["id"], "%00"):
        for method, template, body in ROUTES[2:-1]:
            path = template.format(account=f"/operator/accounts/{account}")
            answer = await operator.ask(method, path, body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    for key in (f"key_{id_text(new_id())}", "key_x", "'"):
        assert (await operator.ask("DELETE", f"/operator/keys/{key}")).status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("", {"label": ""}, "label"),
        ("", {"label": "x", "credits": "1"}, "credits"),
        ("{account}/freeze", {}, "reason"),
        ("{account}/freeze", {"reason": "x" * 501}, "reason"),
        ("{account}/grants", {"credits": "0", "reference": "r", "note": "n"}, "credits"),
        ("{account}/grants", {"credits": "-5", "reference": "r", "note": "n"}, "credits"),
        ("{account}/grants", {"credits": 5, "reference": "r", "note": "n"}, "credits"),
        ("{account}/grants", {"credits": "5", "note": "n"}, "reference"),
    ],
)
async def test_what_an_operator_gets_wrong_is_named(
    alice: Person, operator: Person, path: str, body: dict[str, Any], param: str
) -> None:
    target = path.format(account=path_of(alice)) or "/operator/accounts"
    error = await operator.post(target, body, 400)

    assert (error["code"], error["param"]) == ("invalid_request", param)


async def test_parallel_grants_with_one_reference_grant_once(
    alice: Person, operator: Person
) -> None:
    wish = {"credits": "5", "reference": f"p-{alice.account_id}", "note": "n"}
    answers = await asyncio.gather(
        *(operator.ask("POST", path_of(alice, "/grants"), wish) for _ in range(8))
    )

    assert {answer.status_code for answer in answers} == {201}
    assert (await operator.get(path_of(alice)))["balance"]["credits"] == "1005"


async def test_a_freeze_is_in_the_log_with_its_operator_and_reason(
    alice: Person, operator: Person, caplog: pytest.LogCaptureFixture
) -> None:
    await operator.post(path_of(alice, "/freeze"), {"reason": "chargeback"})

    (record,) = [each for each in caplog.records if each.message == "account.status_set"]
    facts = record.__dict__
    assert facts["operator_key_id"].startswith("opkey_")
    assert facts["billing_account_id"] == f"acct_{id_text(alice.account_id)}"
    assert (facts["status"], facts["reason"]) == ("frozen", "chargeback")
    assert read_id(facts["operator_key_id"])


async def test_made_up_operator_keys_keep_no_receipt_waiting(
    gateway: Gateway, operator: Person
) -> None:
    """Each of them took a connection of those that receipts are posted with."""
    asking = most = 0
    real = store.find_operator

    async def count(*args: Any) -> UUID | None:
        nonlocal asking, most
        asking += 1
        most = max(most, asking)
        try:
            return await real(*args)
        finally:
            asking -= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "find_operator", count)
        secrets = [generate("op").secret.encode() for _ in range(100)]
        found = await asyncio.gather(*map(gateway.services.operators.find, secrets))

    assert (set(found), most) == ({None}, operators.LOOKUPS_AT_ONCE)
    assert (await operator.get("/operator/accounts"))["object"] == "list"
