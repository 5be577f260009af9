"""The text of many frames at once. Pure.

Frames of a stream differ in little but the text they carry. Once it is known what stands before
and after the text in one of them, all that follow with the same bytes there need no parsing: what
is between two such borders is the inside of a JSON string. Everything else is parsed as ever.
"""

import re
from collections.abc import Iterator

import msgspec

from gateway.protocols import sse
from gateway.protocols.bounds import SWARM_BYTES_MIN
from gateway.protocols.chat_answer import texts_in

KEY = b'"choices"'
# Where the text of a frame stands in most of them.
BEFORE_TEXT = tuple(
    b'"%b":%b"' % (name, space)
    for name in (b"content", b"reasoning_content", b"reasoning", b"arguments")
    for space in (b"", b" ")
)
PROBE = b"probe"
# Frames whose borders are learned from one another, of one call: some providers change them often.
LEARNED_MAX = 16
# A frame that is longer is parsed: what it holds may be judged by its size.
FRAME_BYTES_MAX = SWARM_BYTES_MIN // 2
# In a stream whose frames are padded, one of the first is.
FIRST_BYTES = 4096
# OpenAI pads its frames (include_obfuscation):
# https://platform.openai.com/docs/api-reference/chat-streaming
_PADDING = re.compile(rb', ?"obfuscation": ?"[A-Za-z0-9]*"\}\n\n')
_SPECIAL = re.compile(rb"[\x00-\x1f\\]")
_string = msgspec.json.Decoder(str)
_strings = msgspec.json.Decoder(list[str])


class FrameTexts:
    """The texts of the frames of one stream; remembers the shape of the frames that came last."""

    def __init__(self) -> None:
        # What stands before and after the text; no frame begins with a line break.
        self._head, self._tail = b"\n", b""

    def read(self, frames: bytes) -> Iterator[str]:
        """The texts that whole frames carry, in their order."""
        if b"\r" in frames:
            frames = frames.replace(b"\r\n", b"\n")
        if b'"obfuscation"' in frames[:FIRST_BYTES]:
            frames = _PADDING.sub(b"}\n\n", frames)
        head, tail = self._head, self._tail
        start, after, insides, learned = len(head), len(tail), [], 0
        for frame in _split(frames):
            if frame.startswith(head) and frame.endswith(tail):
                end = len(frame) - after
                if start <= end and len(frame) <= FRAME_BYTES_MAX:
                    insides.append(frame[start:end])
                    continue
            if KEY not in frame:
                continue
            yield from self._texts_of_alike(insides)
            yield from _texts_of(frame)
            insides = []
            if learned < LEARNED_MAX:
                learned += 1
                self._learn(frame)
                head, tail = self._head, self._tail
                start, after = len(head), len(tail)
        yield from self._texts_of_alike(insides)

    def _texts_of_alike(self, insides: list[bytes]) -> list[str]:
        """The texts of frames that have the borders, by what is between these."""
        texts = _texts_inside(insides)
        if texts is None:
            texts = []
            for inside in insides:
                text = _inside_of_string(inside)
                texts += _texts_of(self._head + inside + self._tail) if text is None else [text]
        return texts

    def _learn(self, frame: bytes) -> None:
        """Take over the borders of a frame whose only text stands where it does in most."""
        if not frame.startswith(b"data: {") or b"\n" in frame:
            return
        for key in BEFORE_TEXT:
            start = frame.find(key) + len(key)
            end = frame.find(b'"', start)
            if start < len(key) or end < 0:
                continue
            head, tail = frame[:start], frame[end:]
            # Other strings may have such a name: only where a probe is read, the text is read.
            if _texts_of(head + PROBE + tail) == [PROBE.decode()]:
                self._head, self._tail = head, tail
                return


def _split(frames: bytes) -> list[bytes]:
    """As `frames.split(b"\\n\\n")`, twice as fast when each frame is one line."""
    lines = frames.split(b"\n")
    return frames.split(b"\n\n") if any(lines[1::2]) else lines[::2]


def _texts_inside(insides: list[bytes]) -> list[str] | None:
    """The texts that these insides of JSON strings stand for; None when that is not sure."""
    joined = b"".join(insides)
    if b'"' in joined:
        return None
    try:
        if not _SPECIAL.search(joined):
            return [joined.decode()]
        # None has a quote, so a backslash at an end can only make one of two, which is seen.
        texts = _strings.decode(b'["%b"]' % b'","'.join(insides))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return texts if len(texts) == len(insides) else None


def _inside_of_string(inside: bytes) -> str | None:
    try:
        return _string.decode(b'"%b"' % inside)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _texts_of(frame: bytes) -> list[str]:
    return list(texts_in(sse.payload_of(frame)))
