"""Modes whose answers are sound HTTP: pure functions from the request's facts to a Plan."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .answer import (
    COST_MARK,
    BadMode,
    Facts,
    Json,
    chunk,
    chunks,
    document,
    error,
    pretty,
    sse,
    usage,
    usage_chunk,
    words,
)

DONE = b"data: [DONE]\n\n"
HTML = b"<!doctype html><html><body><h1>502 Bad Gateway</h1></body></html>\n"
JSON_TYPE = "application/json"
SSE_TYPE = "text/event-stream; charset=utf-8"
COMMENT = b": OPENROUTER PROCESSING\n\n"


@dataclass(kw_only=True)
class Plan:
    """An answer ready to send: frames when as_stream, the body otherwise."""

    body: bytes = b""
    frames: list[bytes]
    as_stream: bool
    status: int = 200
    content_type: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    frame_delay_ms: float = 0


def standard(facts: Facts, *, doc: Json | None = None, stream: list[Json] | None = None) -> Plan:
    """A correct answer, with doc or stream in place of the usual content."""
    payloads = chunks(facts) if stream is None else stream
    return Plan(
        body=pretty(document(facts) if doc is None else doc),
        frames=[sse(item, spaced=bool(facts.params.spaced)) for item in payloads] + [DONE],
        as_stream=facts.stream,
    )


def fixed(status: int, body: bytes, content_type: str = JSON_TYPE) -> Plan:
    """The same bytes whether or not a stream was asked for."""
    return Plan(body=body, frames=[], as_stream=False, status=status, content_type=content_type)


def failure(status: int, message: str, code: str | None = None) -> Plan:
    return fixed(status, pretty(error(status, message, code)))


def value(facts: Facts) -> str:
    """The mode's one positional parameter."""
    if len(facts.params.values) != 1:
        raise BadMode(f"mode {facts.mode!r} takes one value: {facts.mode}:VALUE")
    return facts.params.values[0]


def with_usage(facts: Facts, used: Any) -> Plan:
    """A correct answer, but for the usage; None leaves it out, even of a stream that asked."""
    doc, stream = document(facts), chunks(facts)
    if used is None:
        del doc["usage"]
        stream = [{k: v for k, v in item.items() if k != "usage"} for item in stream]
        return standard(facts, doc=doc, stream=[item for item in stream if item["choices"]])
    doc["usage"] = used
    if facts.include_usage:
        stream[-1] = usage_chunk(facts, used)
    return standard(facts, doc=doc, stream=stream)


def cost(facts: Facts) -> Plan:
    """usage.cost with the very digits of the parameter (1e-7 and 0.10 stay as they are)."""
    text = value(facts).encode()
    plan = with_usage(facts, {**usage(facts), "cost": COST_MARK})
    mark = f'"{COST_MARK}"'.encode()
    plan.body = plan.body.replace(mark, text)
    plan.frames = [frame.replace(mark, text) for frame in plan.frames]
    return plan


def header_cost(facts: Facts) -> Plan:
    plan = standard(facts)
    plan.headers = (("x-litellm-response-cost", value(facts)),)
    return plan


def _counts_as(convert: Callable[[int], Any]) -> Callable[[Facts], Plan]:
    """A mode in which all counts of usage went through convert."""

    def change(item: Any) -> Any:
        return {k: change(v) for k, v in item.items()} if isinstance(item, dict) else convert(item)

    return lambda facts: with_usage(facts, change(usage(facts)))


def null_usage(facts: Facts) -> Plan:
    plan = with_usage(facts, {})
    plan.body = pretty({**document(facts), "usage": None})
    if facts.include_usage:
        plan.frames[-2] = sse(usage_chunk(facts, None))
    return plan


def usage_twice(facts: Facts) -> Plan:
    """First one token of text, then the truth. A whole answer has the key twice."""
    first = usage(facts, visible=1)
    plan = standard(facts)
    earlier = b'\n  "usage": ' + json.dumps(first).encode() + b","
    plan.body = plan.body.replace(b"{", b"{" + earlier, 1)
    if facts.include_usage:
        plan.frames.insert(-2, sse(usage_chunk(facts, first)))
    return plan


def usage_every_chunk(facts: Facts) -> Plan:
    """Cumulative usage in each chunk, asked for or not; no chunk of its own."""
    stream, seen = [], 0
    for item in chunks(facts):
        if not item["choices"]:
            continue
        seen += bool(item["choices"][0]["delta"].get("content"))
        stream.append({**item, "usage": usage(facts, visible=seen // facts.n)})
    return standard(facts, stream=stream)


def usage_between(facts: Facts) -> Plan:
    """Usage in a chunk of its own after= of the others (half), and the whole stream at once."""
    stream = chunks(facts)
    after = len(stream) // 2 if facts.params.after is None else facts.params.after
    stream.insert(after, usage_chunk(facts, usage(facts, visible=1)))
    plan = standard(facts, stream=stream)
    plan.frames = [b"".join(plan.frames)]
    return plan


def usage_in_last_choice(facts: Facts) -> Plan:
    """As OpenRouter: the chunk with finish_reason has usage, too, asked for or not."""
    stream = [item for item in chunks(facts) if item["choices"]]
    stream[-1] = {**stream[-1], "usage": usage(facts)}
    return standard(facts, stream=stream)


def above_max_tokens(facts: Facts) -> Plan:
    """Ignores max_tokens: twice as many tokens, or tokens= of them."""
    count = facts.params.tokens or 2 * (facts.max_tokens or 32)
    pieces = words(facts, count)
    doc = document(facts, {"content": "".join(pieces)}, "stop")
    doc["usage"] = used = usage(facts, visible=count)
    stream = chunks(facts, ({"content": piece} for piece in pieces), "stop")
    if facts.include_usage:
        stream[-1] = usage_chunk(facts, used)
    return standard(facts, doc=doc, stream=stream)


def no_done(facts: Facts) -> Plan:
    plan = standard(facts)
    plan.frames.pop()
    return plan


def after_done(facts: Facts) -> Plan:
    plan = standard(facts)
    plan.frames += [sse(chunk(facts, {"content": " AFTER DONE"})), b": bye\n\n", DONE]
    return plan


def error_in_200(facts: Facts) -> Plan:
    """after= chunks of content first; done=0 leaves [DONE] out."""
    body = error(500, "The server had an error while processing your request.", "server_error")
    plan = standard(facts, doc=body)
    kept = content_frames(facts, plan.frames) if facts.params.after is not None else []
    plan.frames = [*kept, sse(body), *([DONE] if facts.params.done else [])]
    return plan


def content_frames(facts: Facts, frames: list[bytes]) -> list[bytes]:
    """The opening and the first after= pieces of text."""
    return frames[: facts.n * (1 + (facts.params.after or 0))]


def status(facts: Facts) -> Plan:
    code = _status(facts)
    names = {
        400: "invalid_value",
        401: "invalid_api_key",
        403: "unsupported_country_region_territory",
        404: "model_not_found",
        429: "rate_limit_exceeded",
    }
    plan = failure(code, f"The upstream says {code}.", names.get(code))
    if facts.params.retry_after is not None:
        plan.headers = (("retry-after", str(facts.params.retry_after)),)
    return plan


def _status(facts: Facts) -> int:
    text = value(facts)
    if not (text.isdigit() and 200 <= int(text) <= 599):
        raise BadMode(f"{text!r} is no status")
    return int(text)


def redirect(facts: Facts) -> Plan:
    """307 to a path that counts who follows (redirects_followed in /_stats)."""
    plan = fixed(307, b"", "text/plain")
    plan.headers = (("location", "/v1/redirected"),)
    return plan


def crlf(facts: Facts) -> Plan:
    plan = standard(facts)
    plan.frames = [frame.replace(b"\n\n", b"\r\n\r\n") for frame in plan.frames]
    return plan


def comments(facts: Facts) -> Plan:
    """Comment lines between frames; blank lines before a whole answer. Both as OpenRouter does."""
    plan = standard(facts)
    plan.frames = [part for frame in plan.frames for part in (COMMENT, frame)]
    plan.body = b"\n         \n" * 3 + plan.body
    return plan


def big_frame(facts: Facts) -> Plan:
    """One line of about bytes= bytes; usage counts a token for every four."""
    size = facts.params.bytes
    used = usage(facts, visible=size // 4)
    doc = {**document(facts, {"content": "x" * size}, "stop"), "usage": used}
    stream = chunks(facts, [{"content": "x" * size}], "stop")
    if facts.include_usage:
        stream[-1] = usage_chunk(facts, used)
    return standard(facts, doc=doc, stream=stream)


def json_for_sse(facts: Facts) -> Plan:
    plan = standard(facts)
    plan.as_stream = False
    return plan


def sse_for_json(facts: Facts) -> Plan:
    plan = standard(facts)
    plan.as_stream = True
    return plan


def tools(facts: Facts) -> Plan:
    """One call of get_fare; the arguments come in four pieces."""
    call = {
        "id": f"call_{facts.seed[:16]}",
        "type": "function",
        "function": {"name": "get_fare", "arguments": '{"from":"north","to":"river"}'},
    }
    text = call["function"]["arguments"]  # type: ignore[index]
    opening = {**call, "index": 0, "function": {"name": "get_fare", "arguments": ""}}
    pieces = [text[i : i + 8] for i in range(0, len(text), 8)]
    deltas = [{"content": None, "tool_calls": [opening]}]
    deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": p}}]} for p in pieces]
    doc = document(facts, {"content": None, "tool_calls": [call]}, "tool_calls")
    return standard(facts, doc=doc, stream=chunks(facts, deltas, "tool_calls"))


def reasoning_text(facts: Facts) -> Plan:
    """Thoughts as DeepSeek sends them, one token each; reasoning= says how many (8)."""
    thoughts = words(facts, facts.params.reasoning or 8)
    deltas = [{"reasoning_content": piece, "content": None} for piece in thoughts]
    deltas += [{"content": piece} for piece in words(facts)]
    doc = document(facts, {"reasoning_content": "".join(thoughts)})
    return standard(facts, doc=doc, stream=chunks(facts, deltas))


PLANS: dict[str, Callable[[Facts], Plan]] = {
    "plain": standard,
    "cost": cost,
    "header-cost": header_cost,
    "no-usage": lambda facts: with_usage(facts, None),
    "null-usage": null_usage,
    "zero-usage": _counts_as(lambda count: 0),
    "negative-usage": _counts_as(lambda count: -count - 1),
    "huge-usage": _counts_as(lambda count: 2**63),
    "bool-usage": _counts_as(lambda count: True),
    "string-usage": _counts_as(str),
    "float-usage": _counts_as(lambda count: count + 0.5),
    "usage-twice": usage_twice,
    "usage-between": usage_between,
    "usage-every-chunk": usage_every_chunk,
    "usage-in-last-choice": usage_in_last_choice,
    "above-max-tokens": above_max_tokens,
    "no-done": no_done,
    "after-done": after_done,
    "error-in-200": error_in_200,
    "html-200": lambda facts: fixed(200, HTML, "text/html"),
    "status": status,
    "status-html": lambda facts: fixed(_status(facts), HTML, "text/html"),
    "redirect": redirect,
    "crlf": crlf,
    "comments": comments,
    "big-frame": big_frame,
    "sse-for-json": sse_for_json,
    "json-for-sse": json_for_sse,
    "tools": tools,
    "reasoning-text": reasoning_text,
}
