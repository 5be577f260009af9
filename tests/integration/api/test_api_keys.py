"""`/api/v1/keys` over HTTP on a running gateway: made, read, changed, revoked, and by whom."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from billing.windows import window_start
from config.ids import id_text, new_id, read_id
from tests.support.gateway import Gateway, eventually, make_settings, running_gateway
from tests.support.people import Person, calling, note_spend, signed_in
from tests.support.upstream.launch import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}
IN_A_YEAR = (datetime.now(UTC) + timedelta(days=365)).isoformat(timespec="seconds")
EVERYTHING = {
    "name": "Caf\u00e9 \u2615 bot",
    "expires_at": IN_A_YEAR,
    "budget": {"credits": "2.5", "window": "week"},
    "rpm": 60,
    "tpm": 100_000,
    "max_concurrency": 3,
    "models": ["plain", "echo", "plain"],
    "ip_allow": ["203.0.113.0/24", "2001:db8::1"],
    "scopes": ["infer"],
}


async def infer(gateway: Gateway, key: str) -> httpx.Response:
    authorization = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(headers=authorization) as client:
        return await client.post(gateway.base_url + "/chat/completions", json=HELLO)


async def test_a_key_is_made_shown_once_and_works(gateway: Gateway, alice: Person) -> None:
    made = await alice.new_key()
    secret = made.pop("key")
    read = await alice.get(f"/keys/{made['id']}")
    answer = await infer(gateway, secret)
    await gateway.at_rest()

    assert secret.startswith("fb_test_")
    assert read == made
    assert (made["object"], made["status"], made["name"]) == ("api_key", "active", "test")
    assert made["hint"] == f"{secret[:12]}...{secret[-4:]}"
    assert made["limits"] == {"rpm": None, "tpm": None, "max_concurrency": None}
    assert made["scopes"] == ["infer", "account"]
    assert made["created_at"].endswith("Z")
    assert answer.status_code == 200
    receipt = await gateway.receipt(answer.headers["x-receipt-id"])
    assert receipt["app_key_id"] == read_id(made["id"])
    assert receipt["billing_account_id"] == alice.account_id


async def test_everything_that_may_be_asked_of_a_key_is_kept(alice: Person) -> None:
    made = await alice.new_key(**EVERYTHING)
    listed = (await alice.get("/keys"))["data"]

    assert listed == [{name: value for name, value in made.items() if name != "key"}]
    assert made["name"] == EVERYTHING["name"]
    assert datetime.fromisoformat(made["expires_at"]) == datetime.fromisoformat(IN_A_YEAR)
    assert made["limits"] == {"rpm": 60, "tpm": 100_000, "max_concurrency": 3}
    assert made["models"] == ["plain", "echo"]
    assert made["ip_allow"] == ["203.0.113.0/24", "2001:db8::1/128"]
    assert made["scopes"] == ["infer"]
    start = window_start("week", datetime.now(UTC))
    assert made["budget"] == {
        "credits": "2.5",
        "usd": "0.0025",
        "window": "week",
        "spent": {"credits": "0", "usd": "0"},
        "remaining": {"credits": "2.5", "usd": "0.0025"},
        "resets_at": (start + timedelta(days=7)).isoformat().replace("+00:00", "Z"),
    }


async def test_a_secret_is_in_no_table_no_log_and_no_later_answer(
    gateway: Gateway, alice: Person, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    made = await alice.new_key()
    rotated = await alice.post(f"/keys/{made['id']}/rotate", {"overlap_s": 60})
    later = [
        (await alice.ask("GET", "/keys")).text,
        (await alice.ask("GET", f"/keys/{made['id']}")).text,
        (await alice.ask("PATCH", f"/keys/{made['id']}", {"name": "x"})).text,
        (await alice.ask("DELETE", f"/keys/{made['id']}")).text,
    ]
    tables = await gateway.pool.fetch(
        "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
    )
    for table in tables:
        rows = await gateway.pool.fetch(f"SELECT * FROM {table['table_name']}")  # noqa: S608
        later += [str(dict(row)) for row in rows]
    later += [f"{record.getMessage()} {record.__dict__}" for record in caplog.records]

    assert any("key.rotated" in text for text in later)
    for secret in (made["key"], rotated["key"]):
        assert not [text for text in later if secret in text or secret[8:40] in text]


async def test_answers_with_secrets_are_in_no_cache(alice: Person) -> None:
    answer = await alice.ask("POST", "/keys", {"name": "x"})

    assert answer.headers["cache-control"] == "no-store"


async def test_keys_are_listed_in_pages_newest_first(alice: Person) -> None:
    made = [(await alice.new_key(name=f"n{number}"))["id"] for number in range(5)]
    pages, cursor = [], ""
    while True:
        page = await alice.get(f"/keys?limit=2&cursor={cursor}")
        pages.append([key["id"] for key in page["data"]])
        assert page["object"] == "list"
        assert page["has_more"] == (page["next_cursor"] is not None)
        if not page["has_more"]:
            break
        cursor = page["next_cursor"]

    made.reverse()
    assert pages == [made[:2], made[2:4], made[4:]]


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "cursor=x", "cursor=acct_1"])
async def test_a_page_that_is_none_is_refused(alice: Person, query: str) -> None:
    error = await alice.ask("GET", f"/keys?{query}")

    assert error.status_code == 400
    assert error.json()["error"]["param"] == query.split("=", maxsplit=1)[0]


async def test_a_patch_changes_what_it_names_and_null_removes(alice: Person) -> None:
    made = await alice.new_key(**EVERYTHING)
    del made["key"]
    path = f"/keys/{made['id']}"

    renamed = await alice.patch(path, {"name": "other"})
    assert renamed == {**made, "name": "other"}
    nothing = await alice.patch(path, {})
    assert nothing == renamed
    bare = dict.fromkeys(("expires_at", "budget", "rpm", "models", "ip_allow"))
    removed = await alice.patch(path, bare)
    limits = {**made["limits"], "rpm": None}
    assert removed == {**renamed, **{n: v for n, v in bare.items() if n != "rpm"}, "limits": limits}
    budget = {"credits": "7", "window": "total"}
    again = await alice.patch(path, {"budget": budget, "scopes": ["account", "payments"]})
    assert again["budget"]["resets_at"] is None
    assert again["budget"]["remaining"] == {"credits": "7", "usd": "0.007"}
    assert again["scopes"] == ["account", "payments"]
    assert await alice.get(path) == again


async def test_what_a_budget_has_left_comes_from_the_days_of_its_window(
    gateway: Gateway, alice: Person
) -> None:
    made = await alice.new_key(budget={"credits": "10", "window": "month"})
    start = window_start("month", datetime.now(UTC))
    await note_spend(gateway, made["id"], {start - timedelta(days=1): 4_000_000, start: 7_500_000})
    month = (await alice.get(f"/keys/{made['id']}"))["budget"]
    total = (await alice.patch(f"/keys/{made['id']}", {"budget": _total("10")}))["budget"]

    assert (month["spent"]["credits"], month["remaining"]["credits"]) == ("7.5", "2.5")
    assert (total["spent"]["credits"], total["remaining"]["credits"]) == ("11.5", "0")


def _total(credits: str) -> dict[str, str]:
    return {"credits": credits, "window": "total"}


@pytest.mark.parametrize("is_till_away", [False, True])
async def test_a_revoked_key_is_refused_within_five_seconds(
    gateway: Gateway, alice: Person, is_till_away: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """At once as long as the till can be told; else when the answer of the book is old."""
    made = await alice.new_key()
    assert (await infer(gateway, made["key"])).status_code == 200
    if is_till_away:
        await gateway.services.link.close()
    gone = await alice.delete(f"/keys/{made['id']}")
    again = await alice.delete(f"/keys/{made['id']}")
    if is_till_away:
        gateway.services.link.start()
        await gateway.services.link.wait_up(5)

    async def refused() -> dict[str, Any] | None:
        answer = await infer(gateway, made["key"])
        return dict(answer.json()["error"]) if answer.status_code == 401 else None

    error = await eventually(refused, 5 if is_till_away else 0.5)
    await gateway.at_rest()

    assert error["code"] == "invalid_api_key"
    assert gone["status"] == "revoked"
    assert gone["revoked_at"] is not None
    assert again == gone
    assert ("key.till_untold" in caplog.text) == is_till_away


async def test_a_revoked_key_is_history(alice: Person) -> None:
    made = await alice.new_key()
    await alice.delete(f"/keys/{made['id']}")

    for error in (
        await alice.patch(f"/keys/{made['id']}", {"name": "x"}, 409),
        await alice.post(f"/keys/{made['id']}/rotate", {}, 409),
    ):
        assert error["code"] == "key_revoked"
    assert (await alice.get("/keys"))["data"][0]["status"] == "revoked"


async def test_nobody_reaches_the_keys_of_another_account(
    gateway: Gateway, alice: Person, bob: Person
) -> None:
    """Another's id, an id of nobody and garbage are told apart by nothing."""
    mine, grant = await alice.new_key(), await alice.new_key()
    await gateway.tamper(
        "UPDATE app_api_keys SET kind = 'grant', expires_at = now() + interval '1 day' "
        "WHERE id = $1",
        read_id(grant["id"]),
    )
    strange = (mine["id"], f"key_{id_text(new_id())}", "key_", "key_x", mine["id"][4:], "%00", "'")
    seen = []
    for person, ids in ((bob, strange), (alice, (grant["id"], "acct_" + mine["id"][4:]))):
        for key_id in ids:
            for method, path, body in (
                ("GET", "", None),
                ("PATCH", "", {"name": "stolen"}),
                ("DELETE", "", None),
                ("POST", "/rotate", {}),
            ):
                answer = await person.ask(method, f"/keys/{key_id}{path}", body)
                seen.append((answer.status_code, answer.json()["error"]["message"]))

    assert set(seen) == {(404, "There is no such key.")}
    assert (await bob.get("/keys"))["data"] == []
    (key,) = (await alice.get("/keys"))["data"]
    assert (key["name"], key["status"], key["rotated_at"]) == ("test", "active", None)


async def test_keys_cannot_manage_keys(gateway: Gateway, alice: Person) -> None:
    made = await alice.new_key(scopes=["infer", "account", "payments"])
    async with calling(gateway, made["key"]) as key:
        for method, path, body in (
            ("POST", "/keys", {"name": "x"}),
            ("GET", "/keys", None),
            ("GET", f"/keys/{made['id']}", None),
            ("PATCH", f"/keys/{made['id']}", {"budget": None}),
            ("DELETE", f"/keys/{made['id']}", None),
            ("POST", f"/keys/{made['id']}/rotate", {}),
        ):
            answer = await key.ask(method, path, body)
            assert answer.status_code == 403
            assert answer.json()["error"]["code"] == "session_required"
    async with calling(gateway, "") as nobody:
        assert (await nobody.ask("GET", "/keys")).status_code == 401


async def test_an_account_has_a_bounded_number_of_keys(
    book_url: str, till_url: str, upstream: Upstream
) -> None:
    settings = make_settings(upstream.base_url, keys__per_account_max=3)
    async with (
        running_gateway(book_url, till_url, upstream.base_url, settings) as gateway,
        signed_in(gateway) as alice,
        signed_in(gateway) as bob,
    ):
        answers = await asyncio.gather(
            *(alice.ask("POST", "/keys", {"name": "x"}) for _ in range(8))
        )
        made = [answer.json() for answer in answers if answer.status_code == 201]
        refused = [answer.json()["error"]["code"] for answer in answers if answer.is_error]
        await bob.new_key()
        await alice.delete(f"/keys/{made[0]['id']}")
        await alice.post("/keys", {"name": "x"}, 409)  # made and revoked within a day
        await gateway.tamper("UPDATE app_api_keys SET created_at = now() - interval '25 hours'")
        await alice.new_key()
        await alice.post("/keys", {"name": "x"}, 409)

    assert len(made) == 3
    assert refused == ["too_many_keys"] * 5
