"""The clients of a run: each sends one request and keeps what it saw."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.faults.plan import Behaviour, Order
from tests.faults.world import World, messages
from tests.support.rawclient import (
    Broken,
    Ended,
    Leave,
    Outcome,
    RawRequest,
    Reading,
    chat,
    exchange,
)

DEADLINE_S = 20
SLOW = Reading(rcvbuf=4096, rate=60_000, size=2048)


@dataclass(kw_only=True)
class Answer:
    """What one client got. `words`: of whole frames only, so they are certain."""

    order: Order
    status: int = 0
    request_id: str = ""
    words: int = 0
    is_whole: bool = False
    """All of a complete answer came, its end included, and no error."""
    error_code: str = ""
    cost_nanos: int | None = None
    """What it was told it paid."""
    trouble: str = ""
    """What no client may ever see: an answer that is no HTTP, or none at all in time."""


async def send_all(world: World, key: str, orders: Sequence[Order]) -> list[Answer]:
    return await asyncio.gather(*(send(world, key, order) for order in orders))


async def send(world: World, key: str, order: Order) -> Answer:
    await asyncio.sleep(order.start_ms / 1000)
    answer = Answer(order=order)
    leaves = order.behaviour in {Behaviour.LEAVE, Behaviour.VANISH}
    try:
        outcome = await exchange(
            world.origin,
            request(key, order),
            cut_after_bytes=order.leave_after if leaves else None,
            leave=Leave.CLOSE if order.start_ms % 2 else Leave.RST,
            reading=SLOW if order.behaviour is Behaviour.SLOW else None,
            deadline=DEADLINE_S,
        )
    except (Broken, TimeoutError, ConnectionError) as exc:
        answer.trouble = repr(exc)
        return answer
    _read(answer, outcome)
    return answer


def request(key: str, order: Order) -> RawRequest:
    payload: dict[str, Any] = {"model": order.model, "messages": messages(order.prompt)}
    if order.stream:
        payload["stream"] = True
        if order.wants_usage:
            payload["stream_options"] = {"include_usage": True}
    if order.max_tokens is not None:
        payload["max_tokens"] = order.max_tokens
    return chat(key, payload, [("x-request-id", order.name)])


def _read(answer: Answer, outcome: Outcome) -> None:
    answer.status = outcome.status
    if outcome.head is not None:
        answer.request_id = (outcome.head.get("x-request-id") or "").removeprefix("req_")
    is_complete = outcome.ended is Ended.COMPLETE
    content_type = (outcome.head.get("content-type") or "") if outcome.head else ""
    if content_type.startswith("text/event-stream"):
        _read_stream(answer, outcome, is_complete)
    elif is_complete and outcome.body:
        _read_body(answer, outcome.json())


def _read_body(answer: Answer, body: dict[str, Any]) -> None:
    if "error" in body:
        answer.error_code = str(body["error"]["code"])
        return
    answer.words = _words(choice["message"] for choice in body["choices"])
    answer.cost_nanos = body["usage"]["cost_nanos"]
    answer.is_whole = True


def _read_stream(answer: Answer, outcome: Outcome, is_complete: bool) -> None:
    body = outcome.body
    # Half a frame at the end says nothing for certain.
    frames = whole_frames(body)
    is_done = "[DONE]" in frames
    for frame in frames:
        if frame == "[DONE]":
            continue
        chunk = json.loads(frame)
        if "error" in chunk:
            answer.error_code = str(chunk["error"]["code"])
        answer.words += _words(choice["delta"] for choice in chunk.get("choices", ()))
        usage = chunk.get("usage")
        if usage is not None and "cost_nanos" in usage:
            answer.cost_nanos = usage["cost_nanos"]
    answer.is_whole = is_done and is_complete and not answer.error_code


def whole_frames(body: bytes) -> list[str]:
    blocks = body.decode(errors="replace").split("\n\n")[:-1]
    lines = [line for block in blocks for line in block.splitlines()]
    return [line[5:].strip() for line in lines if line.startswith("data:")]


def _words(messages: Any) -> int:
    return sum(len((message.get("content") or "").split()) for message in messages)


@dataclass(kw_only=True)
class Served:
    """What the provider did for one request."""

    outcome: str
    words: list[tuple[float, int]] = field(default_factory=list)
    """time.monotonic() and the words written until then, all together."""
    failed: bool = False
    """It answered with an error and nothing else: it bills nothing."""

    @property
    def all_words(self) -> int:
        return self.words[-1][1] if self.words else 0

    def words_at(self, moment: float) -> int:
        return max((count for at, count in self.words if at <= moment), default=0)


def served(world: World) -> dict[str, Served]:
    """By prompt. Blocks while it asks the provider."""
    found: dict[str, Served] = {}
    for seen in world.upstream.last():
        try:
            body = json.loads(seen["body"])
        except ValueError:
            continue
        prompt = body["messages"][0]["content"]
        assert prompt not in found, "the gateway sent one request twice"
        found[prompt] = _served(body, seen)
    return found


def _served(body: dict[str, Any], seen: dict[str, Any]) -> Served:
    count, counts = 0, []
    for at, piece in seen["written"]:
        count += _written_words(body, piece)
        counts.append((at, count))
    is_failure = str(body["model"]).startswith("status:")
    return Served(outcome=seen["outcome"], words=counts, failed=is_failure)


def _written_words(body: dict[str, Any], text: str) -> int:
    """The provider writes whole frames, and a whole answer at once."""
    if body.get("stream") is not True:
        try:
            return _words(choice["message"] for choice in json.loads(text).get("choices", ()))
        except ValueError:
            return 0
    chunks = [json.loads(f) for f in whole_frames(text.encode("latin-1")) if f != "[DONE]"]
    return sum(_words(choice["delta"] for choice in c.get("choices", ())) for c in chunks)
