"""What the relay's tests share: a gateway for a whole module, prices by hand, and a clean end.

A module says what it needs in MODELS (public id to model) and OVERRIDES (settings), or, when these
need the provider's address, overrides_at; its tests run on the module's event loop.
"""

import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any
from uuid import UUID

import asyncpg
import redis.asyncio

from config.settings import Settings
from tests.support.gateway import Gateway, eventually, running_gateway, zoo_model
from tests.support.rawclient import Outcome, RawRequest, exchange

NANOS = 10**9
MESSAGES = [{"role": "user", "content": "Where does this line end?"}]
# US dollars per million tokens, as tests.support.gateway.PRICE has them.
INPUT, CACHED, OUTPUT = Fraction(1), Fraction(1, 2), Fraction(4)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a call used, by kind; the kinds are part of their totals."""

    prompt: int
    completion: int
    cached: int = 0
    reasoning: int = 0


def cost_by_hand(used: Tokens, reasoning: Fraction = OUTPUT) -> Fraction:
    """US dollars, exactly."""
    millionths = (
        (used.prompt - used.cached) * INPUT
        + used.cached * CACHED
        + (used.completion - used.reasoning) * OUTPUT
        + used.reasoning * reasoning
    )
    return millionths / 10**6


def nanos_by_hand(usd: Fraction, markup: Fraction = Fraction(1)) -> int:
    """Rounded once, up."""
    return ceil(usd * NANOS * markup)


def price_by_hand(used: Tokens) -> int:
    return nanos_by_hand(cost_by_hand(used), Fraction(2))


def public_id(mode: str) -> str:
    """The public id under which a mode is on offer: not every character may be in it."""
    return re.sub(r"[^\w.:/@+~-]", "~", mode)


def zoo(*modes: str, **more: object) -> dict[str, Any]:
    """Models for these modes."""
    return {public_id(mode): zoo_model(mode, **more) for mode in modes}


class Relay:
    """A gateway of a module, and the calls its tests make."""

    def __init__(self, gateway: Gateway, till: "redis.asyncio.Redis") -> None:
        self.gateway = gateway
        self.services = gateway.services
        self._till = till
        self._accounts: dict[str, UUID] = {}
        self.standing_tasks = 0

    async def key(self, credits: str = "1000", **terms: Any) -> str:
        """A key of a new account."""
        account_id = await self.gateway.account(credits)
        key = await self.gateway.key(account_id, **terms)
        self._accounts[key] = account_id
        return key

    def account_of(self, key: str) -> UUID:
        return self._accounts[key]

    def chat(
        self, key: str, model: str, *, headers: Sequence[tuple[str, str]] = (), **fields: Any
    ) -> RawRequest:
        payload = {"model": public_id(model), "messages": MESSAGES, **fields}
        fixed = [("authorization", f"Bearer {key}"), ("content-type", "application/json")]
        return RawRequest(headers=[*fixed, *headers], body=json.dumps(payload).encode())

    async def call(self, key: str, model: str, **fields: Any) -> Outcome:
        return await self.send(self.chat(key, model, **fields))

    async def send(self, request: RawRequest, **more: Any) -> Outcome:
        return await exchange(self.gateway.origin, request, **more)

    async def only_receipt(self, key: str) -> dict[str, Any]:
        """The one receipt of the key's account."""
        (receipt,) = await self.receipts(key, 1)
        return receipt

    async def receipts(self, key: str, count: int) -> list[dict[str, Any]]:
        """All receipts of the key's account, once everything is at rest: so many, no more."""
        await self.at_rest()
        query = "SELECT * FROM charge_receipts WHERE billing_account_id = $1 ORDER BY started_at"
        rows = await self.gateway.pool.fetch(query, self.account_of(key))
        assert len(rows) == count, [(row["outcome"], row["price_nanos"]) for row in rows]
        return [dict(row) for row in rows]

    async def spent(self, key: str) -> int:
        """Nanos that the ledger has charged to the key's account."""
        query = "SELECT coalesce(-sum(amount_nanos), 0) FROM credit_ledger"
        query += " WHERE billing_account_id = $1 AND reason = 'charge'"
        return int(await self.gateway.pool.fetchval(query, self.account_of(key)))

    async def at_rest(self) -> None:
        """Wait until no call, drain, hold, outbox entry or background task is left."""
        await self.gateway.at_rest()

        async def clean() -> bool | None:
            services = self.services
            busy = (
                services.drains or services.open_calls or len(services.tasks) > self.standing_tasks
            )
            return None if busy or await self.left_in_till() else True

        try:
            await eventually(clean)
        except TimeoutError:
            found = (self.services.drains, self.services.open_calls, len(self.services.tasks))
            raise AssertionError(f"left open: {found}, {await self.left_in_till()}") from None

    async def left_in_till(self) -> list[str]:
        """Holds, leases, outbox entries and amounts that are not zero."""
        left = []
        async for raw in self._till.scan_iter("fb:{s*", count=1000):
            key = raw.decode()
            kind = key.split("}:")[1].split(":")[0]
            if kind in {"h", "leases", "outbox"}:
                left.append(key)
            elif kind in {"a", "k", "b"}:
                found = await self._till.hmget(key, "held", "uncommitted", "open")
                left += [key] if any(int(value or 0) for value in found) else []
        return left


@asynccontextmanager
async def running_relay(
    template_url: str, till_url: str, upstream_url: str, settings: Settings, name: str
) -> AsyncIterator[Relay]:
    """A gateway with a database of its own and an empty till."""
    admin = await asyncpg.connect(template_url)
    till = redis.asyncio.from_url(till_url)
    try:
        await till.flushall()
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE farebox_template")
        book_url = template_url.rsplit("/", 1)[0] + f"/{name}"
        async with running_gateway(book_url, till_url, upstream_url, settings) as gateway:
            relay = Relay(gateway, till)
            relay.standing_tasks = len(gateway.services.tasks)
            yield relay
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    finally:
        await till.aclose()
        await admin.close()


def frames_of(outcome: Outcome) -> list[dict[str, Any]]:
    """The JSON of all frames; the last one must be [DONE]."""
    *frames, done = outcome.frames()
    assert done == "[DONE]"
    return [json.loads(frame) for frame in frames]


def text_of(frames: Sequence[Mapping[str, Any]]) -> str:
    deltas = [choice["delta"] for frame in frames for choice in frame["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


def error_of(outcome: Outcome) -> dict[str, Any]:
    """The error of an answer, checked for the envelope and the headers that every error has."""
    head = outcome.head
    assert head is not None
    error = outcome.json()["error"]
    assert set(error) == {"message", "type", "code", "param", "doc_url", "request_id"}
    assert head.get("content-type") == "application/json"
    assert error["request_id"] == head.get("x-request-id")
    assert head.get("access-control-allow-origin") == "*"
    assert head.get("x-farebox-overhead-ms") is not None
    assert head.status != 408
    assert "charged" in error["message"]
    return dict(error)
