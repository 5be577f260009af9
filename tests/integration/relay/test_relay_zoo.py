"""Every odd provider meets every odd client: one receipt, nobody overcharged, a sane answer.

The pairs are a seeded sample; `--full` takes all of them.
"""

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from billing.tokens import count_tokens
from gateway.protocols.chat import prompt_text, read_facts
from tests.support.gateway import zoo_model
from tests.support.rawclient import Ended, Leave, Outcome, Reading, exchange
from tests.support.relay import MESSAGES, Relay, Tokens, price_by_hand, public_id
from tests.support.upstream.launch import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

SEED = 20_261_125
SAMPLE, AT_ONCE = 300, 16
# The provider counts the prompt as we do, so that there is one true price.
PROMPT = count_tokens(
    prompt_text(read_facts(json.dumps({"model": "m", "messages": MESSAGES}).encode()))
)
USED = f"prompt={PROMPT},tokens=6"
MODES = [
    *("plain", "no-usage", "null-usage", "usage-twice", "zero-usage", "negative-usage"),
    *("huge-usage", "bool-usage", "string-usage", "float-usage", "usage-every-chunk"),
    *("usage-in-last-choice", "above-max-tokens", "split-utf8", "crlf", "one-byte", "comments"),
    *("no-done", "after-done", "error-in-200", "error-in-200:after=3", "html-200", "gzip"),
    *("stall-head", "stall-body:after=3", "cut:after=3", "cut:after=3,rst=1", "refuse-close"),
    *("refuse-close:rst=1", "endless:chunk_delay_ms=20", "status:500", "status:429", "redirect"),
    *("json-for-sse", "sse-for-json", "big-frame:bytes=300000", "plain:delay_ms=200"),
    "plain:chunk_delay_ms=30",
]
# What the provider says or does costs nothing, whoever reads it.
FREE = ("error-in-200", "html-200", "refuse-close", "status", "redirect")


def mode_of(mode: str) -> str:
    return f"{mode}{',' if ':' in mode else ':'}{USED}"


MODELS: dict[str, Any] = {
    public_id(mode_of(mode)): zoo_model(mode_of(mode), output_tokens_max=100_000) for mode in MODES
}
OVERRIDES = {
    "timeouts__upstream_first_byte_s": 1.0,
    "timeouts__upstream_chunk_s": 0.6,
    "timeouts__request_total_s": 3.0,
    "timeouts__drain_s": 0.4,
    "timeouts__write_stall_s": 1.0,
    "till__call_timeout_ms": 1000,
}


@dataclass(frozen=True, kw_only=True)
class Client:
    """How a client behaves. cut: bytes of the answer after which it leaves."""

    name: str
    cut: int | None = None
    leave: Leave = Leave.RST
    half_close: bool = False
    reading: Reading | None = None


CLIENTS = [
    Client(name="stays"),
    Client(name="reads slowly", reading=Reading(rcvbuf=4096, rate=200_000, size=1000)),
    Client(name="ends its side", half_close=True),
    Client(name="leaves at once", cut=0),
    Client(name="leaves in the head", cut=40, leave=Leave.CLOSE),
    Client(name="leaves in the body", cut=900),
    Client(name="leaves late", cut=2500, leave=Leave.CLOSE),
]


@dataclass(frozen=True, kw_only=True)
class Pair:
    mode: str
    client: Client
    stream: bool
    wants_usage: bool

    @property
    def name(self) -> str:
        form = ("stream" if self.stream else "whole") + ("+usage" if self.wants_usage else "")
        return f"{self.mode} / {self.client.name} / {form}"


def pairs(is_full: bool) -> list[Pair]:
    forms = [(False, False), (True, False), (True, True)]
    found = [
        Pair(mode=mode, client=client, stream=stream, wants_usage=wants_usage)
        for mode, client, (stream, wants_usage) in itertools.product(MODES, CLIENTS, forms)
    ]
    random.Random(SEED).shuffle(found)
    return found if is_full else found[:SAMPLE]


@pytest_asyncio.fixture(loop_scope="module")
async def recording(upstream: Upstream) -> AsyncIterator[Upstream]:
    """The provider remembers all that it writes, as long as the test runs."""
    await asyncio.to_thread(upstream.record)
    yield upstream
    await asyncio.to_thread(upstream.reset)


async def call(relay: Relay, key: str, pair: Pair) -> Outcome:
    fields: dict[str, Any] = {"stream": True} if pair.stream else {}
    if pair.wants_usage:
        fields["stream_options"] = {"include_usage": True}
    # A prompt of the same length for each, by which the provider's record is found.
    headers = [("x-request-id", pair.name)]
    request = relay.chat(key, mode_of(pair.mode), headers=headers, user=pair.name, **fields)
    client = pair.client
    return await exchange(
        relay.gateway.origin,
        request,
        cut_after_bytes=client.cut,
        leave=client.leave,
        half_close=client.half_close,
        reading=client.reading,
        deadline=30,
    )


def told(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The text of what the provider wrote, and the usage objects in it."""
    if text.lstrip().startswith(("data:", ":")):
        frames = [line[5:].strip() for line in text.splitlines() if line.startswith("data:")]
        documents = [json.loads(frame) for frame in frames if frame.endswith("}")]
    else:
        documents = [json.loads(text)] if text.rstrip().endswith("}") else []
    parts = [
        (choice.get("delta") or choice.get("message") or {}).get("content") or ""
        for document in documents
        for choice in document.get("choices", ())
    ]
    return "".join(parts), [d["usage"] for d in documents if isinstance(d.get("usage"), dict)]


def most(pair: Pair, seen: dict[str, Any] | None) -> int:
    """The true price of what the provider did: its own word, or all that it wrote, counted."""
    if seen is None or (pair.mode.startswith(FREE) and "after" not in pair.mode):
        return 0
    if pair.mode.startswith("gzip"):
        return price_by_hand(Tokens(prompt=PROMPT, completion=6))
    written = "".join(piece for _, piece in seen["written"]).encode("latin-1")
    text, usages = told(written.decode(errors="replace"))
    claims = [usage.get("completion_tokens") for usage in usages]
    sane = [n for n in claims if isinstance(n, int) and not isinstance(n, bool) and n < 10**9]
    output = max([count_tokens(text), *sane])
    return price_by_hand(Tokens(prompt=PROMPT, completion=output))


def is_sane(pair: Pair, outcome: Outcome) -> None:
    """Whoever stays gets HTTP that ends as it promised, in the shape that was asked for.

    A client that ended its side counts as gone: from here a plain close looks the same.
    """
    if pair.client.cut is not None or pair.client.half_close:
        return
    assert outcome.ended is Ended.COMPLETE, outcome.ended
    head = outcome.head
    assert head is not None
    assert head.status in {200, 502, 503, 504}
    assert head.get("x-receipt-id") is not None
    if (head.get("content-type") or "").startswith("text/event-stream"):
        *frames, done = outcome.frames()
        assert done == "[DONE]"
        documents = [json.loads(frame) for frame in frames]
        assert all("choices" in d or "error" in d for d in documents)
    elif head.status == 200:
        assert outcome.json()["usage"]["receipt_id"] == head.get("x-receipt-id")
    else:
        assert "charged" in outcome.json()["error"]["message"]


def wrong(pair: Pair, outcome: Outcome, receipts: list[Any], seen: dict[str, Any] | None) -> str:
    """What is not as it must be with one pair; nothing when all is well."""
    try:
        is_sane(pair, outcome)
    except (AssertionError, ValueError) as exc:
        return f"{pair.name}: {outcome.status} {outcome.body[:200]!r}: {exc}"
    if len(receipts) != 1:
        return f"{pair.name}: {len(receipts)} receipts"
    (receipt,) = receipts
    price, bound = receipt["price_nanos"], most(pair, seen)
    if not 0 <= price <= min(bound, receipt["hold_nanos"]):
        return f"{pair.name}: paid {price}, at most {bound}: {receipt['usage_source']}"
    is_whole = receipt["outcome"] == "complete" and pair.mode != "zero-usage"
    if is_whole and not price:
        return f"{pair.name}: complete and free"
    return ""


async def test_any_provider_with_any_client_leaves_one_fair_receipt(
    relay: Relay, recording: Upstream, is_full: bool
) -> None:
    print(f"seed {SEED}")  # noqa: T201 - shown when it fails
    chosen = pairs(is_full)
    key = await relay.key("100000")
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(pair: Pair) -> Outcome:
        async with slots:
            return await call(relay, key, pair)

    outcomes = await asyncio.gather(*map(one, chosen))
    await relay.at_rest()

    query = "SELECT * FROM charge_receipts WHERE billing_account_id = $1"
    by_name: dict[str, list[Any]] = {}
    for row in await relay.gateway.pool.fetch(query, relay.account_of(key)):
        by_name.setdefault(row["client_request_id"], []).append(row)
    seen = {json.loads(s["body"])["user"]: s for s in await asyncio.to_thread(recording.last)}
    results = [
        wrong(pair, outcome, by_name.get(pair.name, []), seen.get(pair.name))
        for pair, outcome in zip(chosen, outcomes, strict=True)
    ]
    found = [said for said in results if said]
    assert not found, "\n".join(found)
    paid = sum(row["price_nanos"] for rows in by_name.values() for row in rows)
    assert paid == await relay.spent(key) > 0


async def test_the_sample_has_every_mode_and_every_client() -> None:
    chosen = pairs(is_full=False)

    assert {pair.mode for pair in chosen} == set(MODES)
    assert {pair.client for pair in chosen} == set(CLIENTS)
