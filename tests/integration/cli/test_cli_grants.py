"""`farebox grants`, `accounts system` and upstream credentials, beside a running gateway."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from config.ids import id_text, new_id, read_id
from config.secret import Secret
from tests.support.cli import Cli
from tests.support.gateway import PEPPER, Gateway, eventually, make_settings, running_gateway
from tests.support.upstream.launch import Upstream

OLD, NEW = os.urandom(32).hex(), os.urandom(32).hex()
OWN = "own-litellm-key"


@pytest.fixture
def cli(tmp_path: Path, book_url: str, till_url: str, upstream: Upstream) -> Cli:
    return Cli(
        tmp_path,
        upstream.base_url,
        DATABASE_URL=book_url,
        TILL_URL=till_url,
        KEYS__PEPPER=PEPPER,
        KEYS__ENCRYPTION_KEY=OLD,
    )


def soon(**more: float) -> str:
    return (datetime.now(UTC) + timedelta(**(more or {"hours": 1}))).isoformat()


async def infer(gateway: Gateway, key: str) -> tuple[int, Any]:
    body = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {key}"}, timeout=30) as client:
        answer = await client.post(gateway.base_url + "/chat/completions", json=body)
    return answer.status_code, answer.json()


async def test_a_grant_is_minted_listed_used_and_revoked(gateway: Gateway, cli: Cli) -> None:
    account = f"acct_{id_text(await gateway.account())}"
    wanted = ("--account", account, "--budget", "5", "--expires-at", soon())
    run = ("--run-id", "run-1", "--graph-id", "graph-1", "--model", "plain")
    made = await cli.json("grants", "create", *wanted, *run)
    used, _ = await infer(gateway, made["api_key"])
    (listed,) = await cli.json("grants", "list", "--account", account)
    revoked = await cli.json("grants", "revoke", made["grant_id"])
    refused, _ = await infer(gateway, made["api_key"])

    assert (used, refused) == (200, 401)
    assert made.pop("api_key").startswith("fb_test_")
    assert listed == made | {"spent_nanos": listed["spent_nanos"]}
    assert (made["run_id"], made["graph_id"], made["models"]) == ("run-1", "graph-1", ["plain"])
    assert (made["budget_nanos"], made["status"]) == (5_000_000, "active")
    assert (revoked["status"], revoked["grant_id"]) == ("revoked", made["grant_id"])


async def test_grants_that_cannot_be_are_refused_in_words(gateway: Gateway, cli: Cli) -> None:
    account = f"acct_{id_text(await gateway.account())}"
    good = {"--account": account, "--budget": "5", "--expires-at": soon()}
    for change, code, word in [
        ({"--expires-at": soon(days=31)}, 2, "30 days"),
        ({"--expires-at": "yesterday"}, 2, "RFC 3339"),
        ({"--budget": "0"}, 2, "more than nothing"),
        ({"--budget": "much"}, 2, "credits"),
        ({"--model": "unknown"}, 2, "no such model"),
        ({"--run-id": ""}, 2, "--run-id"),
        ({"--account": f"acct_{id_text(new_id())}"}, 1, "no such account"),
    ]:
        options = [word for pair in {**good, **change}.items() for word in pair]
        status, _, err = await cli.run("grants", "create", *options)
        assert (status, word in err) == (code, True), err
    status, _, err = await cli.run("grants", "revoke", f"grant_{id_text(new_id())}")
    assert (status, "no such grant" in err) == (1, True)


async def test_the_system_tenant_is_made_once_with_finite_caps(
    gateway: Gateway, cli: Cli, book_url: str
) -> None:
    first = await cli.json("accounts", "system", "--key", "night jobs")
    again = await cli.json("accounts", "system", "--credits", "5", "--rpm", "60")
    status, body = await infer(gateway, first["api_key"])
    conn = await asyncpg.connect(book_url)
    tenants = await conn.fetch("SELECT * FROM billing_accounts WHERE is_system_tenant")
    ledger = await conn.fetch("SELECT reason, reference, amount_nanos FROM credit_ledger")
    budgets = await conn.fetch("SELECT budget_nanos, budget_window FROM virtual_keys")
    await conn.close()

    assert status == 200
    assert body["usage"]["receipt_id"].startswith("rcpt_")
    assert (first["is_new"], again["is_new"]) == (True, False)
    assert first["billing_account_id"] == again["billing_account_id"]
    caps = {"budget_a_day_nanos": 10_000_000_000, "open_requests_max": 20, "tpm": 1_000_000}
    assert first | caps | {"rpm": 600} == first
    assert again | caps | {"rpm": 60} == again
    assert [row["id"] for row in tenants] == [read_id(first["billing_account_id"])]
    grants = [row for row in ledger if row["reason"] == "grant"]
    assert [tuple(row) for row in grants] == [
        ("grant", "system_tenant_first_credits", 100_000_000_000)
    ]
    assert {tuple(row) for row in budgets} == {(10_000_000_000, "day")}


async def test_the_system_tenant_is_stopped_like_anybody(gateway: Gateway, cli: Cli) -> None:
    """Its kill switch is that of every account."""
    made = await cli.json("accounts", "system", "--key", "jobs")
    account = made["billing_account_id"]
    assert (await infer(gateway, made["api_key"]))[0] == 200
    await cli.json("accounts", "freeze", account, "--reason", "runs wild")
    status, body = await infer(gateway, made["api_key"])
    again = await cli.json("accounts", "system")
    await cli.json("accounts", "thaw", account, "--reason", "mended")

    assert (status, body["error"]["code"]) == (403, "account_frozen")
    assert again["status"] == "frozen"

    async def thawed() -> bool | None:
        return (await infer(gateway, made["api_key"]))[0] == 200 or None

    await eventually(thawed)


async def test_a_secret_for_a_provider_is_set_from_stdin_or_a_file_and_never_shown(
    book_url: str, till_url: str, upstream: Upstream, cli: Cli, tmp_path: Path
) -> None:
    settings = make_settings(upstream.base_url, keys__encryption_key=Secret(OLD))
    async with running_gateway(book_url, till_url, upstream.base_url, settings) as gateway:
        secret = await gateway.key()
        uid = await gateway.pool.fetchval("SELECT id FROM app_api_keys")
        key = f"key_{id_text(uid)}"
        path = tmp_path / "secret"
        path.write_text(OWN + "\n")
        said = [await cli.run("keys", "set-upstream", key, "zoo", stdin=OWN + "-first\n")]
        said += [await cli.run("keys", "set-upstream", key, "zoo", "--file", str(path), "--json")]
        said += [await cli.run("keys", "list-upstream", key)]
        assert (await infer(gateway, secret))[0] == 200
    headers = dict(upstream.last()[-1]["headers"])
    cli.environ = {**cli.environ, "FAREBOX_KEYS__ENCRYPTION_KEY": NEW}
    cli.environ = {**cli.environ, "FAREBOX_KEYS__ENCRYPTION_KEY_PREVIOUS": OLD}
    resealed = await cli.json("keys", "reseal-upstream")
    deleted = await cli.json("keys", "delete-upstream", key, "zoo")

    assert headers["authorization"] == f"Bearer {OWN}"
    assert [code for code, _, _ in said] == [0, 0, 0]
    assert OWN not in str(said)
    assert "zoo" in said[2][1]
    assert resealed == {"resealed": 1}
    assert (deleted["app_key_id"], deleted["provider"]) == (key, "zoo")
    for provider, stdin, code in [("nobody", OWN, 2), ("echo", OWN, 2), ("zoo", "a b c d e", 2)]:
        status, _, err = await cli.run("keys", "set-upstream", key, provider, stdin=stdin)
        assert (status, stdin in err) == (code, False)
    cli.environ = {**cli.environ, "FAREBOX_KEYS__ENCRYPTION_KEY": ""}
    assert (await cli.run("keys", "set-upstream", key, "zoo", stdin=OWN))[0] == 78
