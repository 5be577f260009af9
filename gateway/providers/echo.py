"""The built-in provider: says back what it was asked, so that everything works without a key.

Deterministic: the same request gives the same text. Usage is a count of words, in and out, so it
can be checked by hand. Delay, pace and length come from config.
"""

import asyncio
import time
from collections.abc import Callable, Iterator

import msgspec

from config.settings import Provider
from gateway.providers.upstream import UpstreamReply, UpstreamRequest

CREATED = 1_700_000_000
_FILLER = ("and", "that", "is", "all", "there", "is", "to", "say", "about", "it")


class _Message(msgspec.Struct):
    role: str = ""
    content: msgspec.Raw = msgspec.Raw(b"null")


class _Options(msgspec.Struct):
    include_usage: bool = False


class _Request(msgspec.Struct):
    messages: list[_Message] = []
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    stream_options: _Options | None = None


class EchoReply:
    """An answer made of ready pieces, with a pause before each but the first."""

    def __init__(
        self, status: int, content_type: str, pieces: list[bytes], pause_s: float = 0
    ) -> None:
        self.status = status
        self._headers = {"content-type": content_type}
        self._pieces = pieces[::-1]
        self._pause_s = pause_s
        self._due = time.monotonic()

    def header(self, name: str) -> str | None:
        return self._headers.get(name)

    def whole(self) -> bytes | None:
        return None

    async def pump(self, take: Callable[[bytes], bool]) -> bool:
        while piece := await self.read():
            if not take(piece):
                return True
        return False

    async def read(self) -> bytes:
        # A point in time, not a pause: whoever cancels and reads again waits no longer for it.
        if (left_s := self._due - time.monotonic()) > 0:
            await asyncio.sleep(left_s)
        self._due = time.monotonic() + self._pause_s
        return self._pieces.pop() if self._pieces else b""

    def close(self) -> None:
        """Nothing is held open."""


class EchoUpstream:
    """Answers by itself, in OpenAI's shapes."""

    def __init__(self, provider: Provider) -> None:
        self._delay_s = provider.delay_ms / 1000
        self._chunk_delay_s = provider.chunk_delay_ms / 1000
        self._words_max = provider.output_tokens

    async def send(self, request: UpstreamRequest) -> UpstreamReply:
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        try:
            asked = msgspec.json.decode(request.body, type=_Request)
        except msgspec.DecodeError as exc:
            return EchoReply(400, "application/json", [_error(str(exc))])
        words = self._words(asked)
        if request.stream:
            frames = list(_frames(request, asked, words))
            return EchoReply(200, "text/event-stream", frames, self._chunk_delay_s)
        return EchoReply(200, "application/json", [_body(request, asked, words)])

    async def close(self) -> None:
        """Nothing is held open."""

    def _words(self, asked: _Request) -> list[str]:
        said = [_text(m.content) for m in asked.messages if m.role == "user"]
        words = ["You", "said:", *(said[-1].split() if said else []), *_FILLER]
        limit = asked.max_completion_tokens or asked.max_tokens or self._words_max
        return words[: min(limit, self._words_max)]


def _frames(request: UpstreamRequest, asked: _Request, words: list[str]) -> Iterator[bytes]:
    deltas: list[dict[str, str]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word if i == 0 else f" {word}"} for i, word in enumerate(words)]
    for delta in deltas:
        yield _frame(request, [{"index": 0, "delta": delta, "finish_reason": None}])
    last = _frame(request, [{"index": 0, "delta": {}, "finish_reason": "stop"}])
    if asked.stream_options is not None and asked.stream_options.include_usage:
        last += _frame(request, [], _usage(asked, words))
    yield last + b"data: [DONE]\n\n"


def _text(content: msgspec.Raw) -> str:
    value = msgspec.json.decode(content)
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else []
    return " ".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def _usage(asked: _Request, words: list[str]) -> dict[str, int]:
    prompt = sum(len(_text(message.content).split()) for message in asked.messages)
    completion = len(words) * (asked.n or 1)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _head(request: UpstreamRequest, kind: str) -> dict[str, object]:
    return {
        "id": f"chatcmpl-{request.request_id}",
        "object": kind,
        "created": CREATED,
        "model": request.model,
    }


def _body(request: UpstreamRequest, asked: _Request, words: list[str]) -> bytes:
    message = {"role": "assistant", "content": " ".join(words)}
    choices = [
        {"index": i, "message": message, "finish_reason": "stop"} for i in range(asked.n or 1)
    ]
    head = _head(request, "chat.completion")
    return msgspec.json.encode(head | {"choices": choices, "usage": _usage(asked, words)})


def _frame(
    request: UpstreamRequest,
    choices: list[dict[str, object]],
    usage: dict[str, int] | None = None,
) -> bytes:
    chunk = _head(request, "chat.completion.chunk") | {"choices": choices, "usage": usage}
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def _error(message: str) -> bytes:
    error = {"message": message, "type": "invalid_request_error", "code": None, "param": None}
    return msgspec.json.encode({"error": error})
