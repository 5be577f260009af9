"""What was learned from an answer so far: usage, ids, and the text for counting.

Frames are kept as they came, because hardly any stream needs its text: it is counted only when the
provider reports no usage. What all streams of a worker keep that way has a bound.
"""

from collections.abc import Iterable

from msgspec import Raw

from gateway.protocols import sse
from gateway.protocols.chat_answer import Answer, read_answer, read_string, read_usage, texts_in
from gateway.protocols.chat_end import finished_choices
from gateway.protocols.chat_text import FrameTexts
from gateway.protocols.facts import UsageReport

# Frames are turned into text, a twentieth of their size, when a stream has kept this many bytes.
KEPT_BYTES_MAX = 64 * 1024
# While all streams together keep more than this, each turns its frames into text sooner.
ALL_KEPT_BYTES_MAX = 16 * 1024 * 1024
KEPT_BYTES_MAX_THEN = 4 * 1024
# Text beyond this is only measured: memory must not grow with the answer.
TEXT_CHARS_MAX = 1024 * 1024
FRAMES_WITH_IDS = 8


class Kept:
    """Bytes of frames that all streams of a worker keep."""

    def __init__(self) -> None:
        self.bytes = 0

    def bound(self) -> int:
        """How many of them one stream may keep now."""
        return KEPT_BYTES_MAX if self.bytes <= ALL_KEPT_BYTES_MAX else KEPT_BYTES_MAX_THEN


# One for each process, as is the memory.
ALL_KEPT = Kept()


class Seen:
    """What was learned from an answer so far."""

    def __init__(self) -> None:
        self.report: UsageReport | None = None
        self.usage_raw: Raw | None = None
        self.model = ""
        self.upstream_id = ""
        self.bytes = 0
        self.chars_beyond = 0
        self.text_bytes = 0
        self.chars = 0
        self.finished: frozenset[int] = frozenset()
        self._frame_texts: FrameTexts | None = None
        self._texts: list[str] = []
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._body = b""

    @property
    def is_empty(self) -> bool:
        """True when nothing of a completion came: no text, no usage, not even a model's name."""
        return self.report is None and not self.text() and not self.model

    @property
    def text_size(self) -> int:
        """All of the text in bytes, nearly: what is beyond the bound in characters."""
        return self.text_bytes + self.chars_beyond

    def note(self, answer: Answer) -> None:
        """Take over what an answer or frame says of itself."""
        self.model = read_string(answer.model) or self.model
        self.upstream_id = read_string(answer.id) or self.upstream_id
        if answer.has_usage:
            report = read_usage(answer.usage)
            # A usage without counts never takes the place of one with counts.
            if self.report is None or report.usage is not None:
                self.report = report
                self.usage_raw = answer.usage

    def keep(self, frames: bytes) -> None:
        self._kept.append(frames)
        size = len(frames)
        self._kept_bytes += size
        ALL_KEPT.bytes += size
        if self._kept_bytes > KEPT_BYTES_MAX_THEN and self._kept_bytes > ALL_KEPT.bound():
            self.fold()

    def keep_body(self, body: bytes) -> None:
        self._body = body

    def text(self) -> str:
        """All text that came, but for `chars_beyond` characters."""
        self.fold()
        if self._body:
            body, self._body = self._body, b""
            self.add_text(texts_in(body))
        self._texts = ["".join(self._texts)]
        return self._texts[0]

    def text_after(self, chars: int) -> str:
        """The text that came after so many characters, of what `fold` took in."""
        parts, left = [], self.chars - chars
        for text in reversed(self._texts):
            if left <= 0:
                break
            parts.append(text[-left:])
            left -= len(text)
        return "".join(reversed(parts))

    def cut(self, chars: int) -> None:
        """Forget so many characters at the end of the text: they were not delivered."""
        beyond = min(chars, self.chars_beyond)
        self.chars_beyond -= beyond
        text = self.text()
        kept = text[: len(text) - (chars - beyond)]
        self._texts, self.chars = [kept], len(kept)
        self.text_bytes = _size(kept)

    def add_text(self, texts: Iterable[str]) -> None:
        text = "".join(texts)
        room = TEXT_CHARS_MAX - self.chars
        if len(text) > room:
            self.chars_beyond += len(text) - room
            text = text[:room]
        if text:
            self._texts.append(text)
            self.chars += len(text)
            self.text_bytes += _size(text)

    def release(self) -> None:
        """Keep no more frames: the call is settled, nobody will count."""
        ALL_KEPT.bytes -= self._kept_bytes
        self._kept, self._kept_bytes = [], 0

    def __del__(self) -> None:
        ALL_KEPT.bytes -= self._kept_bytes

    def _learn_ids(self) -> None:
        """Model and id from the first frames, when no frame with usage told them."""
        frames = sse.frames_with(b'"model"', b"".join(self._kept[:1]))
        for frame in frames[:FRAMES_WITH_IDS]:
            answer = read_answer(sse.payload_of(frame))
            if answer is not None:
                self.model = self.model or read_string(answer.model)
                self.upstream_id = self.upstream_id or read_string(answer.id)

    def fold(self) -> None:
        """Turn the frames that were kept into text."""
        if not self.model:
            self._learn_ids()
        kept = self._kept
        self.release()
        frames = b"".join(kept)
        self.finished = self.finished.union(finished_choices(frames))
        self._frame_texts = self._frame_texts or FrameTexts()
        self.add_text(self._frame_texts.read(frames))


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="replace"))
