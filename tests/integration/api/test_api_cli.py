"""`farebox keys|accounts|operators` beside a running gateway: the same as over HTTP."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from config.ids import id_text
from gateway.__main__ import main
from tests.support.gateway import PEPPER, Gateway, eventually
from tests.support.people import Person, calling

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}
CONFIG = """
[keys]
mode = "test"
[providers.echo]
kind = "echo"
[models.plain]
routes = [{ provider = "echo" }]
"""


class Cli:
    """The command line of the gateway's own stores."""

    def __init__(self, gateway: Gateway, valkey_url: str, folder: Path) -> None:
        config = folder / "farebox.toml"
        config.write_text(CONFIG)
        self._env = {
            "FAREBOX_CONFIG": str(config),
            "FAREBOX_DATABASE_URL": gateway.book_url,
            "FAREBOX_TILL_URL": valkey_url,
            "FAREBOX_KEYS__PEPPER": PEPPER,
        }

    async def run(self, *args: str, status: int = 0) -> Any:
        """What a command says as JSON; its complaint when it fails."""
        done = await asyncio.to_thread(CliRunner().invoke, main, [*args, "--json"], env=self._env)
        assert done.exit_code == status, (done.output, done.exception)
        return done.stderr if status else json.loads(done.stdout)


@pytest.fixture
def cli(gateway_of_module: Gateway, valkey_url: str, tmp_path: Path) -> Cli:
    return Cli(gateway_of_module, valkey_url, tmp_path)


async def infer(gateway: Gateway, key: str) -> int:
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {key}"}) as client:
        answer = await client.post(gateway.base_url + "/chat/completions", json=HELLO)
        return answer.status_code


def account_of(person: Person) -> str:
    return f"acct_{id_text(person.account_id)}"


async def test_a_key_is_made_with_terms_changed_and_shown(cli: Cli, alice: Person) -> None:
    made = await cli.run(
        *("keys", "create", "--account", account_of(alice), "--name", "bot"),
        *("--expires-at", "2099-01-31T00:00:00Z", "--budget", "2.5", "--window", "day"),
        *("--rpm", "60", "--tpm", "1000", "--open-requests-max", "3", "--model", "plain"),
        *("--ip", "203.0.113.0/24", "--scope", "infer"),
    )
    over_http = await alice.get(f"/keys/{made['app_key_id']}")
    shown = await cli.run("keys", "show", made["app_key_id"])
    removed = [f"--remove={name}" for name in ("budget", "rpm", "model", "ip", "expires-at")]
    changed = await cli.run("keys", "update", made["app_key_id"], "--name", "cat", *removed)
    (listed,) = await cli.run("keys", "list", "--account", account_of(alice))

    assert over_http["budget"]["credits"] == "2.5"
    assert over_http["limits"] == {"rpm": 60, "tpm": 1000, "max_concurrency": 3}
    assert (over_http["models"], over_http["scopes"]) == (["plain"], ["infer"])
    assert (shown["budget_nanos"], shown["budget_window"]) == (2_500_000, "day")
    assert (shown["name"], shown["spent_nanos"], shown["tpm"]) == ("bot", 0, 1000)
    assert made["api_key"] not in str(shown)
    gone = ("budget_nanos", "budget_window", "rpm", "models", "ip_allow", "expires_at")
    assert [changed[name] for name in gone] == [None] * 6
    assert (changed["name"], changed["tpm"], changed["scopes"]) == ("cat", 1000, ["infer"])
    assert listed == changed


async def test_a_key_is_rotated_and_revoked(gateway: Gateway, cli: Cli, alice: Person) -> None:
    made = await alice.new_key()
    options = ("--overlap-s", "600", "--idempotency-key", "one")
    rotated = await cli.run("keys", "rotate", made["id"], *options)
    again = await cli.run("keys", "rotate", made["id"], *options)
    over_http = await alice.post(
        f"/keys/{made['id']}/rotate", {"overlap_s": 600}, idempotency_key="one"
    )
    said = await cli.run("keys", "rotate", made["id"], "--overlap-s", "600", status=1)

    assert rotated["api_key"] == again["api_key"] == over_http["key"]
    assert "being rotated: its old secret still works. Until 2" in said
    assert await infer(gateway, rotated["api_key"]) == 200
    revoked = await cli.run("keys", "revoke", made["id"])
    assert revoked["status"] == "revoked"
    assert await infer(gateway, rotated["api_key"]) == 401


async def test_an_account_is_frozen_and_thawed(gateway: Gateway, cli: Cli, alice: Person) -> None:
    key = (await alice.new_key())["key"]
    assert await infer(gateway, key) == 200
    frozen = await cli.run("accounts", "freeze", account_of(alice), "--reason", "fraud")
    assert await infer(gateway, key) == 403
    newest = (await cli.run("accounts", "list"))[0]
    thawed = await cli.run("accounts", "thaw", account_of(alice), "--reason", "mistake")

    async def served() -> bool | None:
        return await infer(gateway, key) == 200 or None

    await eventually(served, 5)
    assert (frozen["status"], frozen["status_reason"]) == ("frozen", "fraud")
    assert newest == frozen
    assert (thawed["status"], thawed["status_reason"]) == ("active", "mistake")


async def test_an_operator_is_made_listed_and_revoked(gateway: Gateway, cli: Cli) -> None:
    made = await cli.run("operators", "create", "--name", "ops")
    (listed,) = [
        row
        for row in await cli.run("operators", "list")
        if row["operator_key_id"] == made["operator_key_id"]
    ]
    async with calling(gateway, made["operator_key"]) as operator:
        before = (await operator.ask("GET", "/operator/accounts")).status_code
        revoked = await cli.run("operators", "revoke", made["operator_key_id"])
        after = (await operator.ask("GET", "/operator/accounts")).status_code

    assert (before, after) == (200, 401)
    assert listed["name"] == "ops"
    assert listed["key"] == f"fb_op_...{made['operator_key'][-4:]}"
    assert made["operator_key"] not in str(listed)
    assert revoked["revoked_at"] is not None


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (("keys", "show", "key_x"), 2, "no id of ours"),
        (("keys", "show", "key_" + "0" * 26), 1, "No such key"),
        (("keys", "revoke", "key_" + "0" * 26), 1, "No such key"),
        (("operators", "revoke", "opkey_" + "0" * 26), 1, "No such key"),
        (("accounts", "freeze", "acct_" + "0" * 26, "--reason", "x"), 1, "No such account"),
        (("accounts", "freeze", "acct_" + "0" * 26, "--reason", "a\nb"), 2, "printable"),
        (("operators", "create", "--name", ""), 2, "1 to 200"),
        (("operators", "create", "--name", "x", "--expires-at", "2020-01-01"), 2, "in the past"),
    ],
)
async def test_what_cannot_be_done_is_said_in_one_line(
    cli: Cli, args: tuple[str, ...], status: int, said: str
) -> None:
    assert said in await cli.run(*args, status=status)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--budget", "1"), "belong together"),
        (("--budget", "0", "--window", "day"), "more than nothing"),
        (("--ip", "10.0.0.1/8"), "no network"),
        (("--model", "plian"), "no such model"),
        (("--expires-at", "tomorrow"), "no RFC 3339 time"),
    ],
)
async def test_terms_that_are_none_are_refused(
    cli: Cli, alice: Person, option: tuple[str, ...], said: str
) -> None:
    create = ("keys", "create", "--account", account_of(alice), "--name", "x")

    assert said in await cli.run(*create, *option, status=2)
    assert (await alice.get("/keys"))["data"] == []
