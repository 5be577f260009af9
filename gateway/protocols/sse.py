"""Event streams, frame by frame, with as little work for each byte as possible. Pure.

A frame ends with an empty line. Frames are passed on as they came; only the few that carry usage,
an error or the end are looked into.
https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

import re

_EMPTY_LINE = re.compile(rb"\n\r?\n")
_DATA = re.compile(rb"^data: ?([^\n]*)", re.MULTILINE)
DONE_FRAME = b"data: [DONE]\n\n"
KEEPALIVE = b": keepalive\n\n"


def complete_length(data: bytes) -> int:
    """How many bytes of data are complete frames, with the empty lines after them."""
    if data.endswith(b"\n\n"):
        return len(data)
    lf = data.rfind(b"\n\n")
    # Before a CRLF boundary there may be an LF one and the other way round: the later one counts.
    crlf = data.rfind(b"\n\r\n", max(lf, 0))
    return max(lf + 2 if lf >= 0 else 0, crlf + 3 if crlf >= 0 else 0)


def first_end(data: bytes, start: int) -> int:
    """Where the first frame that ends after start ends; -1 when none does."""
    lf = data.find(b"\n\n", start)
    crlf = data.find(b"\n\r\n", start, lf + 1 if lf >= 0 else len(data))
    if crlf >= 0:
        return crlf + 3
    return lf + 2 if lf >= 0 else -1


def split_frames(complete: bytes) -> list[bytes]:
    """Complete frames, each with its empty line; further empty lines are frames without data."""
    ends = [match.end() for match in _EMPTY_LINE.finditer(complete)]
    if not ends or ends[-1] < len(complete):  # an empty line too many
        ends.append(len(complete))
    return [complete[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def frames_with(key: bytes, complete: bytes) -> list[bytes]:
    """The frames that contain key, without their empty lines."""
    if b"\r" in complete:
        complete = complete.replace(b"\r\n", b"\n")
    return [frame for frame in complete.split(b"\n\n") if key in frame]


def payload_of(frame: bytes) -> bytes:
    """The data of a frame: its `data:` lines, joined; b'' for comments."""
    if frame.startswith(b"data: ") and frame.find(b"\n", 0, len(frame) - 2) < 0:
        return frame[6:].rstrip(b"\r\n")
    return b"\n".join(_DATA.findall(frame.replace(b"\r\n", b"\n")))


def with_payload(frame: bytes, old: bytes, new: bytes) -> bytes:
    """The frame with other data; new takes the place of old, which was `payload_of(frame)`."""
    if old in frame:
        return frame.replace(old, new, 1)
    # The data came in several lines.
    lines = frame.replace(b"\r\n", b"\n").rstrip(b"\n").split(b"\n")
    kept = [line for line in lines if not line.startswith(b"data:")]
    data = [b"data: " + line for line in new.splitlines()]
    return b"\n".join([*kept, *data]) + b"\n\n"


def may_matter(complete: bytes) -> bool:
    """False when no frame in here can carry usage, an error or the end: the common case.

    Text that merely talks about them is escaped inside JSON strings and does not match, and
    providers that were asked for usage write `"usage":null` into every frame.
    """
    if b"[DONE]" in complete or b'"error"' in complete:
        return True
    found = complete.count(b'"usage"')
    if not found:
        return False
    found -= complete.count(b'"usage":null')
    return found != 0 and found != complete.count(b'"usage": null')
