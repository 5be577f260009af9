"""What the tests of growing holds share: amounts in output tokens, and books that must be clean."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from billing.audit import audit
from billing.till_scan import open_till
from gateway.relay.reply import Reply
from tests.support.audit_world import explain
from tests.support.gateway import eventually
from tests.support.relay import MESSAGES, Relay, public_id

# Nanos of one token with tests.support.gateway.PRICE and a markup of two.
PER_INPUT, PER_OUTPUT = 2000, 8000
WINDOW = 64
OVERRIDES = {"limits__stream_window_tokens": WINDOW, "till__renew_every_s": 0.2}


def body_of(model: str, **fields: Any) -> bytes:
    """As Relay.chat sends it."""
    return json.dumps({"model": public_id(model), "messages": MESSAGES, **fields}).encode()


def prompt_nanos(model: str, **fields: Any) -> int:
    """What is held for the prompt: a token for each byte and 64 for the format."""
    return (len(body_of(model, **fields)) + 64) * PER_INPUT


def credits_of(nanos: int) -> str:
    return f"{nanos // 10**6}.{nanos % 10**6:06d}"


async def reply_of(relay: Relay) -> Reply:
    """Our side of the one stream that is under way, once something of it came."""

    async def started() -> Reply | None:
        return next((r for r in relay.services.replies if r.call.first_byte_at), None)

    return await eventually(started)


async def balance(relay: Relay, key: str) -> int:
    query = "SELECT balance_nanos FROM billing_accounts WHERE id = $1"
    return int(await relay.gateway.pool.fetchval(query, relay.account_of(key)))


async def assert_clean(relay: Relay, till_url: str) -> None:
    """Book and till add up, and nothing is open."""
    await relay.at_rest()
    async with relay.gateway.pool.acquire() as conn, open_till(till_url) as till:
        report = await audit(conn, till, at_rest=True)
    assert report.is_clean, explain(report)


def finishes(frames: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """The finish_reason of each choice; no choice has two."""
    found: dict[int, str] = {}
    for frame in frames:
        for choice in frame["choices"]:
            if choice["finish_reason"] is not None:
                assert choice["index"] not in found
                found[choice["index"]] = choice["finish_reason"]
    return found
