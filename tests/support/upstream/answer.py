"""What the provider answers: pure, deterministic, in the shapes that OpenAI sends.

The text depends on model and messages only, so streamed and whole answers agree, whatever a
gateway in between added to the body. Shapes: https://platform.openai.com/docs/api-reference/chat
"""

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

WORDS = ("fare", "box", "coin", "ride", "gate", "meter", "token", "line", "north", "river", "amber")
COST_MARK = "@cost-goes-here@"

Json = dict[str, Any]


class BadMode(Exception):
    """The model id or a field of the body has a name or a value that the provider refuses."""


@dataclass(frozen=True, kw_only=True)
class Params:
    """The parsed part after `mode:`. Every mode accepts every name."""

    values: tuple[str, ...] = ()
    tokens: int | None = None
    prompt: int | None = None
    cached: int = 0
    reasoning: int = 0
    delay_ms: float = 0
    chunk_delay_ms: float | None = None
    after: int | None = None
    bytes: int = 10_000_000
    seconds: float = 60
    retry_after: int | None = None
    rst: int = 0
    done: int = 1
    spaced: int = 0
    batch: int = 1


INT_NAMES = frozenset(
    {"tokens", "prompt", "cached", "reasoning", "after", "bytes", "retry_after", "rst"}
    | {"done", "spaced", "batch"}
)
FLOAT_NAMES = frozenset(["delay_ms", "chunk_delay_ms", "seconds"])


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the request asks for."""

    model: str
    mode: str
    params: Params
    stream: bool
    include_usage: bool
    max_tokens: int | None
    n: int
    messages: list[Any] = field(default_factory=list)

    @property
    def seed(self) -> str:
        text = json.dumps([self.model, self.messages], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def wanted_tokens(self) -> int:
        return 32 if self.params.tokens is None else self.params.tokens

    @property
    def visible_tokens(self) -> int:
        """Tokens of text in one choice, after max_tokens; reasoning counts against it, too."""
        if self.max_tokens is None:
            return self.wanted_tokens
        return max(0, min(self.wanted_tokens, self.max_tokens - self.params.reasoning))

    @property
    def finish(self) -> str:
        return "length" if self.visible_tokens < self.wanted_tokens else "stop"

    @property
    def prompt_tokens(self) -> int:
        if self.params.prompt is not None:
            return self.params.prompt
        return 3 + len(json.dumps(self.messages)) // 4


def parse_params(text: str) -> Params:
    named: dict[str, Any] = {}
    values = []
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            values.append(part)
            continue
        try:
            named[name] = _number(name, value)
        except ValueError as exc:
            raise BadMode(f"bad value in mode parameter {part!r}") from exc
    return Params(values=tuple(values), **named)


def _number(name: str, value: str) -> int | float:
    if name in INT_NAMES:
        return int(value)
    if name in FLOAT_NAMES:
        return float(value)
    raise BadMode(f"unknown mode parameter {name!r}")


def facts_of(body: Json) -> Facts:
    model = str(body.get("model", ""))
    mode, _, rest = model.partition(":")
    options = body.get("stream_options") or {}
    max_tokens = body.get("max_completion_tokens") or body.get("max_tokens")
    count = body.get("n") or 1
    if not (isinstance(options, dict) and isinstance(max_tokens or 0, int)):
        raise BadMode("stream_options or max_tokens has the wrong type")
    if not (isinstance(count, int) and 0 < count <= 128):
        raise BadMode("n has the wrong type or is out of range")
    return Facts(
        model=model,
        mode=mode,
        params=parse_params(rest),
        stream=body.get("stream") is True,
        include_usage=options.get("include_usage") is True,
        max_tokens=max_tokens,
        n=count,
        messages=body.get("messages") or [],
    )


def words(facts: Facts, count: int | None = None) -> list[str]:
    """The text, one piece a token."""
    rng = random.Random(facts.seed)
    picked = rng.choices(WORDS, k=facts.visible_tokens if count is None else count)
    return [word if i == 0 else f" {word}" for i, word in enumerate(picked)]


def usage(facts: Facts, visible: int | None = None) -> Json:
    """OpenAI's usage object; visible is the number of text tokens of one choice."""
    prompt, reasoning = facts.prompt_tokens, facts.params.reasoning
    visible = facts.visible_tokens if visible is None else visible
    completion = facts.n * (visible + reasoning)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": facts.params.cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": reasoning * facts.n,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def document(facts: Facts, message: Json | None = None, finish: str | None = None) -> Json:
    """A whole chat.completion."""
    content = {"role": "assistant", "content": "".join(words(facts)), "refusal": None}
    message = {**content, "annotations": [], **(message or {})}
    choice = {"message": message, "logprobs": None, "finish_reason": finish or facts.finish}
    return {
        **_envelope(facts, "chat.completion"),
        "choices": [{"index": i, **choice} for i in range(facts.n)],
        "usage": usage(facts),
        "service_tier": "default",
        "system_fingerprint": "fp_farebox_test",
    }


def chunks(
    facts: Facts, deltas: Iterable[Json] | None = None, finish: str | None = None
) -> list[Json]:
    """Every chat.completion.chunk of a stream, the usage chunk included when it was asked for."""
    if deltas is None:
        pieces, size = words(facts), facts.params.batch
        starts = range(0, len(pieces), size)
        deltas = ({"content": "".join(pieces[at : at + size])} for at in starts)
    opening = {"role": "assistant", "content": "", "refusal": None}
    out = [chunk(facts, delta, index=i) for delta in (opening, *deltas) for i in range(facts.n)]
    last = finish or facts.finish
    out += [chunk(facts, {}, finish=last, index=i) for i in range(facts.n)]
    if facts.include_usage:
        out = [{**item, "usage": None} for item in out]
        out.append(usage_chunk(facts, usage(facts)))
    return out


def chunk(facts: Facts, delta: Json, *, finish: str | None = None, index: int = 0) -> Json:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {**_envelope(facts, "chat.completion.chunk"), **_TIER, "choices": [choice]}


def usage_chunk(facts: Facts, used: Any) -> Json:
    envelope = _envelope(facts, "chat.completion.chunk")
    return {**envelope, **_TIER, "choices": [], "usage": used}


def error(status: int, message: str, code: str | None = None) -> Json:
    kinds = {401: "invalid_request_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def pretty(doc: Json) -> bytes:
    """OpenAI indents whole answers by two."""
    return json.dumps(doc, indent=2, ensure_ascii=False).encode()


def sse(doc: Json, *, spaced: bool = False, eol: str = "\n") -> bytes:
    separators = (", ", ": ") if spaced else (",", ":")
    text = json.dumps(doc, separators=separators, ensure_ascii=False)
    return f"data: {text}{eol}{eol}".encode()


_TIER: Json = {"service_tier": "default", "system_fingerprint": "fp_farebox_test"}


def _envelope(facts: Facts, kind: str) -> Json:
    return {
        "id": f"chatcmpl-{facts.seed[:24]}",
        "object": kind,
        "created": 1_750_000_000 + int(facts.seed[:6], 16),
        "model": facts.model,
    }
