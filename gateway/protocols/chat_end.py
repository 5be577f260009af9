"""The end of a stream that is stopped before its provider ended it. Pure.

https://platform.openai.com/docs/api-reference/chat-streaming
"""

import re
from collections.abc import Iterable, Iterator

import msgspec
from msgspec import Raw

from gateway.protocols import sse

FINISHED = re.compile(rb'"finish_reason":[ ]?"')
FINISH_REASON = b'"finish_reason"'


class _Choice(msgspec.Struct):
    index: int = 0
    finish_reason: str | None = None


class _Frame(msgspec.Struct):
    choices: list[_Choice] | None = None


_frame = msgspec.json.Decoder(_Frame)


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """What all frames of a stream have in common."""

    id: str
    created: int
    model: str

    def frame(self, choices: list[dict[str, object]], usage: bytes | None = None) -> bytes:
        """A frame in the manner of OpenAI's; usage: JSON."""
        chunk: dict[str, object] = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        if usage is not None:
            chunk["usage"] = Raw(usage)
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def length_frames(envelope: Envelope, indexes: Iterable[int], *, wants_usage: bool) -> bytes:
    """A frame for each choice that is cut off: it ends as one that reached its length does."""
    usage = b"null" if wants_usage else None
    return b"".join(envelope.frame([_cut_off(index)], usage) for index in indexes)


def finished_choices(frames: bytes) -> Iterator[int]:
    """The indexes of the choices that these frames say are finished."""
    if FINISHED.search(frames) is None:
        return
    for frame in sse.frames_with(FINISH_REASON, frames):
        if FINISHED.search(frame) is None:
            continue
        try:
            choices = _frame.decode(sse.payload_of(frame)).choices or []
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            continue
        yield from (choice.index for choice in choices if choice.finish_reason)


def _cut_off(index: int) -> dict[str, object]:
    return {"index": index, "delta": {}, "logprobs": None, "finish_reason": "length"}
