"""`farebox demo` and the commands beside it, as real processes and over HTTP only."""

import asyncio
import json
import socket
import stat
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest

from tests.support.farebox import PEPPER, Done, Running, farebox, is_gone, running_demo
from tests.support.gateway import eventually
from tests.support.rawclient import Outcome, RawRequest, chat, exchange

MARKER = "zebra-of-the-prompt"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_demo(tmp_path_factory.mktemp("demo")) as demo:
        yield demo


async def call(demo: Running, key: str = "", **more: Any) -> Outcome:
    payload = {"model": "echo", "messages": [{"role": "user", "content": "hello"}], **more}
    return await exchange(demo.base_url, chat(key or demo.api_key, payload))


async def account_with_key(demo: Running) -> tuple[str, dict[str, Any]]:
    """A new account without credits, and a key of it."""
    account = (await demo.cli("accounts", "create", "--label", "bob", "--json")).json
    account_id = account["billing_account_id"]
    key = await demo.cli("keys", "create", "--account", account_id, "--name", "k", "--json")
    return account_id, key.json


def test_the_ready_file_tells_everything_and_is_private(demo: Running) -> None:
    path = demo.cwd / "ready.json"

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.with_name("ready.json.part").exists()
    assert demo.base_url.startswith("http://127.0.0.1:")
    assert demo.base_url.endswith("/v1")
    assert demo.api_key.startswith("fb_test_")
    assert demo.facts["operator_key"].startswith("fb_op_")
    assert demo.facts["account_id"].startswith("acct_")
    pids = demo.facts["pids"]
    assert pids["demo"] == demo.process.pid
    assert not any(map(is_gone, (pids["demo"], pids["postgres"], pids["valkey"], *pids["workers"])))


def test_what_a_demo_prints_can_be_copied(demo: Running) -> None:
    printed = (demo.cwd / "stdout").read_text()

    assert f"curl {demo.base_url}/chat/completions -H 'Authorization: Bearer {demo.api_key}'" in (
        printed
    )
    assert demo.facts["operator_key"] in printed


async def test_a_call_leaves_a_receipt_and_a_clean_book(demo: Running) -> None:
    answer = await call(demo)
    receipt_id = (answer.head and answer.head.get("x-receipt-id")) or ""
    usage = answer.json()["usage"]

    async def posted() -> Done | None:
        shown = await demo.cli("receipts", "show", receipt_id, "--json")
        return shown if shown.status == 0 else None

    receipt = (await eventually(posted)).json
    assert receipt["request_id"] == receipt_id
    assert receipt["input_tokens"] == usage["prompt_tokens"]
    assert receipt["output_tokens"] == usage["completion_tokens"]
    assert receipt["price_nanos"] == usage["cost_nanos"] == 2 * receipt["provider_cost_nanos"]
    assert receipt["hold_nanos"] >= receipt["price_nanos"]
    assert receipt["started_at"] <= receipt["first_byte_at"] <= receipt["finished_at"]
    assert receipt["ledger"]["amount_nanos"] == -receipt["price_nanos"]
    table, listed, audit = await asyncio.gather(
        demo.cli("receipts", "show", receipt_id),
        demo.cli("receipts", "list", "--account", receipt["billing_account_id"], "--json"),
        demo.cli("audit"),
    )
    assert f"{receipt['price_nanos']} (" in table.out
    assert receipt_id in {row["request_id"] for row in listed.json}
    assert (audit.status, audit.out.splitlines()[-1]) == (0, "clean")


async def test_a_grant_reaches_the_warm_till_at_once_and_counts_once(demo: Running) -> None:
    account_id, key = await account_with_key(demo)
    broke = await call(demo, key["api_key"])

    assert key["api_key"].startswith("fb_test_")
    assert (broke.status, broke.json()["error"]["code"]) == (402, "insufficient_credits")
    grant = ("credits", "grant", account_id, "25.5", "--reference", "order-1", "--json")
    granted = (await demo.cli(*grant)).json
    assert granted["granted_nanos"] == granted["balance_nanos"] == 25_500_000
    assert (await call(demo, key["api_key"])).status == 200
    again, other, shown, listed = await asyncio.gather(
        demo.cli(*grant),
        demo.cli("credits", "grant", account_id, "1", "--reference", "order-1"),
        demo.cli("accounts", "show", account_id, "--json"),
        demo.cli("accounts", "list"),
    )
    assert again.json["balance_nanos"] == shown.json["balance_nanos"]
    assert (other.status, other.out) == (1, "")
    assert "reference was used before" in other.err
    account = shown.json
    assert account["receipts"] == 1
    assert account["balance_nanos"] == 25_500_000 - account["charged_nanos"]
    assert account["available_nanos"] == account["balance_nanos"]
    assert account_id in listed.out
    assert "balance_credits" in listed.out


async def test_a_revoked_key_is_refused_within_five_seconds(demo: Running) -> None:
    account_id, key = await account_with_key(demo)
    before = await call(demo, key["api_key"])
    revoked = (await demo.cli("keys", "revoke", key["app_key_id"], "--json")).json

    async def refused() -> Outcome | None:
        answer = await call(demo, key["api_key"])
        return answer if answer.status == 401 else None

    assert before.status == 402
    assert revoked["status"] == "revoked"
    answer = await eventually(refused, timeout_s=5)
    assert answer.json()["error"]["code"] == "invalid_api_key"
    listed = await demo.cli("keys", "list", "--account", account_id, "--json")
    assert [(row["app_key_id"], row["status"]) for row in listed.json] == [
        (key["app_key_id"], "revoked")
    ]
    assert key["api_key"] not in listed.out


async def test_commands_exit_with_one_for_a_refusal_and_two_for_misuse(demo: Running) -> None:
    nobody = "acct_" + "0" * 26
    refused = await asyncio.gather(
        demo.cli("accounts", "show", nobody),
        demo.cli("credits", "grant", nobody, "1"),
        demo.cli("keys", "create", "--account", nobody, "--name", "x"),
        demo.cli("keys", "revoke", "key_" + "0" * 26),
        demo.cli("receipts", "show", "rcpt_" + "0" * 26),
    )
    misused = await asyncio.gather(
        demo.cli("accounts", "show", "acct_17"),
        demo.cli("credits", "grant", nobody, "-1"),
        demo.cli("credits", "grant", nobody, "0"),
        demo.cli("credits", "grant", nobody, "many"),
        demo.cli("accounts", "--no-such-option"),
        demo.cli("keys", "create", "--account", nobody, "--name", "x", "--expires-at", "soon"),
    )

    assert [done.status for done in refused] == [1] * 5
    assert [done.status for done in misused] == [2] * 6
    for done in refused:
        assert done.out == ""
        assert "no such" in done.err.lower()
        assert len(done.err.splitlines()) == 1
    assert all(done.err and "Traceback" not in done.err for done in misused)


async def test_the_config_tells_where_its_values_come_from(demo: Running) -> None:
    (demo.cwd / "own.toml").write_text("[billing]\nmarkup_bps = 15_000\n")
    (demo.cwd / "wrong.toml").write_text("[timeouts]\nheader_s = 3\n[server]\nworkers = 0\n")
    pepper = {"FAREBOX_KEYS__PEPPER": PEPPER}
    shown, listed, fine, wrong, wrong_demo = await asyncio.gather(
        demo.cli("config", "show", "--origin", "--config", "own.toml", **pepper),
        demo.cli("config", "show", "--json", **pepper),
        demo.cli("check", "--json", "--config", "own.toml", **pepper),
        demo.cli("check", "--config", "wrong.toml"),
        demo.cli("demo", "--config", "wrong.toml"),
    )

    assert "billing.markup_bps = 15000    # file own.toml" in shown.out
    assert "keys.pepper = ***    # env FAREBOX_KEYS__PEPPER" in shown.out
    assert PEPPER not in shown.out + listed.out
    assert fine.json["ok"] is True
    assert {row["key"] for row in listed.json} >= {"server.port", "keys.pepper"}
    for done in (wrong, wrong_demo):
        assert done.status == 78
        assert "timeouts.header_s: unknown key (did you mean headers_s?)" in done.err
        assert "server.workers" in done.err


async def test_the_version_is_that_of_the_package(demo: Running) -> None:
    done = await farebox("--version", cwd=demo.cwd)

    assert (done.status, done.out) == (0, f"farebox, version {version('farebox')}\n")


async def test_a_second_demo_on_the_same_data_is_refused(demo: Running) -> None:
    second = await demo.cli("demo", "--port", "0")

    assert second.status == 1
    assert f"pid {demo.process.pid} owns" in second.err
    assert "choose another --data-dir" in second.err
    assert (await call(demo)).status == 200


async def test_a_port_in_use_is_told_before_anything_is_started(demo: Running) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = await demo.cli("demo", "--port", str(port), "--data-dir", "elsewhere")

    assert done.status == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.err
    assert not (demo.cwd / "elsewhere").exists()


async def test_the_demo_is_ready_and_shows_its_metrics(demo: Running) -> None:
    ready = await exchange(demo.origin, RawRequest(method="GET", target="/readyz"))
    metrics = await exchange(demo.origin, RawRequest(method="GET", target="/metrics"))

    assert (ready.status, ready.json()) == (200, {"ready": True, "failing": []})
    assert b'farebox_build_info{version="' in metrics.body


async def test_the_log_holds_no_prompt_no_answer_and_no_key(demo: Running) -> None:
    message = {"role": "user", "content": MARKER}
    whole = await call(demo, messages=[message])
    stream = await call(demo, messages=[message], stream=True)
    broken = await exchange(
        demo.base_url, chat(demo.api_key, {"model": "echo", "messages": MARKER})
    )

    assert MARKER in whole.json()["choices"][0]["message"]["content"]
    assert MARKER in stream.body.decode()
    assert broken.status == 400
    lines = [json.loads(line) for line in demo.log.splitlines()]
    assert sum(line["event"] == "request.settled" for line in lines) >= 2
    secrets = (demo.api_key, demo.facts["operator_key"], (demo.cwd / "data/pepper").read_text())
    for secret in (MARKER, "said:", *secrets):
        assert secret not in demo.log
        assert secret not in (demo.cwd / "stderr").read_text()
