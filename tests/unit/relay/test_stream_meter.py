"""However a stream is cut into chunks: the same bytes go on, the same usage is found."""

import json
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from billing.usage import Usage
from gateway.relay.meter import BodyMeter, Piece, PieceKind, StreamMeter
from gateway.relay.seen import TEXT_CHARS_MAX

USAGE = {"prompt_tokens": 7, "completion_tokens": 3}
DONE = b"data: [DONE]\n\n"


def frame(doc: object, eol: str = "\n", spaced: bool = False) -> bytes:
    separators = None if spaced else (",", ":")
    text = json.dumps(doc, separators=separators, ensure_ascii=False)
    return f"data: {text}{eol}{eol}".encode()


def text_frame(text: str, eol: str = "\n", **more: object) -> bytes:
    return frame(
        {"id": "c1", "model": "m1", "choices": [{"delta": {"content": text}}], **more}, eol
    )


def usage_frame(usage: object = USAGE, eol: str = "\n") -> bytes:
    return frame({"id": "c1", "model": "m1", "choices": [], "usage": usage}, eol)


def run(chunks: Sequence[bytes], buffer: int = 256 * 1024) -> tuple[StreamMeter, list[Piece]]:
    meter = StreamMeter(buffer_bytes_max=buffer)
    pieces = [piece for chunk in chunks for piece in meter.feed(chunk)]
    return meter, pieces + meter.end()


def plain(pieces: Sequence[Piece]) -> bytes:
    return b"".join(piece.data for piece in pieces if piece.kind is PieceKind.PLAIN)


def kinds(pieces: Sequence[Piece]) -> list[PieceKind]:
    return [piece.kind for piece in pieces if piece.kind is not PieceKind.PLAIN]


EOLS = st.sampled_from(["\n", "\r\n"])
PASSED_ON = st.one_of(
    st.builds(text_frame, st.text(max_size=12), EOLS),
    st.builds(lambda text, eol: text_frame(text, eol, usage=None), st.text(max_size=5), EOLS),
    st.builds(lambda eol: f": ping{eol}{eol}".encode(), EOLS),
    st.builds(lambda eol: f"event: x{eol}data: {{{eol}data: }}{eol}{eol}".encode(), EOLS),
    st.sampled_from([b"\n", b"\r\n", b"data: usage [DONE] error\n\n", b'data: "[DONE]"\n\n']),
)
HELD_BACK = st.builds(usage_frame, st.just(USAGE), EOLS)


@st.composite
def cut_streams(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    """(frames, the same bytes as chunks)."""
    frames = draw(st.lists(st.one_of(PASSED_ON, PASSED_ON, HELD_BACK), max_size=8))
    data = b"".join([*frames, DONE])
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    edges = zip([0, *cuts], [*cuts, len(data)], strict=True)
    return frames, [data[start:end] for start, end in edges if start < end]


@settings(deadline=None, max_examples=300)
@given(cut_streams())
def test_what_is_passed_on_is_the_stream_without_its_usage_frames(
    stream: tuple[list[bytes], list[bytes]],
) -> None:
    frames, chunks = stream
    usage_frames = [item for item in frames if b'"usage":{' in item]

    meter, pieces = run(chunks)

    # Empty lines between frames carry nothing; they may go with the frame before or after them.
    wanted = b"".join(item for item in frames if item not in usage_frames)
    assert plain(pieces).translate(None, b"\r\n") == wanted.translate(None, b"\r\n")
    assert kinds(pieces) == [PieceKind.USAGE] * len(usage_frames) + [PieceKind.DONE]
    assert meter.is_done
    assert (meter.seen.report is not None) == bool(usage_frames)
    assert meter.seen.bytes == len(b"".join(chunks))


@settings(deadline=None)
@given(st.lists(st.text(max_size=20), min_size=1), st.data())
def test_the_text_for_counting_is_what_came(texts: list[str], data: st.DataObject) -> None:
    stream = b"".join(text_frame(text) for text in texts)
    cut = data.draw(st.integers(0, len(stream)))

    meter, _ = run([stream[:cut], stream[cut:]])

    assert meter.seen.text() == "".join(texts)
    assert (meter.seen.model, meter.seen.upstream_id) == ("m1", "c1")


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 40), st.booleans())
def test_a_frame_above_the_buffer_passes_and_its_usage_is_found(
    size: int, step: int, crlf: bool
) -> None:
    eol = "\r\n" if crlf else "\n"
    long = text_frame("x" * size, eol, usage={**USAGE, "cost": 0.5})
    data = long + text_frame("after", eol) + DONE

    chunks = [data[start : start + step] for start in range(0, len(data), step)]
    meter, pieces = run(chunks, buffer=64)

    assert meter.seen.report is not None
    assert meter.seen.report.usage == Usage(input_tokens=7, output_tokens=3)
    assert plain(pieces) == data.removesuffix(DONE).replace(
        json.dumps({**USAGE, "cost": 0.5}, separators=(",", ":")).encode(), b"null"
    )
    assert kinds(pieces) == [PieceKind.DONE]


def test_a_long_frame_does_not_gather_in_memory() -> None:
    meter = StreamMeter(buffer_bytes_max=64 * 1024)
    chunk = b"x" * 50_000
    meter.feed(b'data: {"choices":[{"delta":{"content":"')
    passed = sum(len(piece.data) for _ in range(400) for piece in meter.feed(chunk))

    assert passed > 400 * len(chunk) - 100_000
    assert len(meter.seen.text()) <= TEXT_CHARS_MAX
    assert len(meter.seen.text()) + meter.seen.chars_beyond == passed


def test_text_beyond_the_bound_is_measured() -> None:
    frames = [text_frame("y" * 60_000) for _ in range(40)]
    meter, _ = run(frames)

    assert len(meter.seen.text()) == TEXT_CHARS_MAX
    assert meter.seen.chars_beyond == 40 * 60_000 - TEXT_CHARS_MAX


def test_usage_beside_text_is_taken_out_of_the_frame() -> None:
    """What the provider billed is not told to the client."""
    meter, pieces = run([text_frame("a", usage={**USAGE, "cost": 0.5}), DONE])

    assert plain(pieces) == text_frame("a", usage=None)
    assert meter.seen.report is not None
    assert str(meter.seen.report.reported_usd) == "0.5"


def test_usage_that_spans_lines_of_data_is_taken_out() -> None:
    """Found: an assertion failed, and the stream with it."""
    data = b'data: {"choices":[{"delta":{}}],\ndata: "usage":{"prompt_tokens":\ndata: 7}}\n\n'

    meter, pieces = run([data, DONE])

    assert b"prompt_tokens" not in plain(pieces)
    assert meter.seen.report is not None
    assert meter.seen.report.usage == Usage(input_tokens=7)


def test_the_last_usage_counts_unless_it_makes_no_sense() -> None:
    meter, pieces = run([usage_frame({"prompt_tokens": 1}), usage_frame(), usage_frame({}), DONE])

    assert meter.seen.report is not None
    assert meter.seen.report.usage == Usage(input_tokens=7, output_tokens=3)
    assert kinds(pieces) == [PieceKind.USAGE] * 3 + [PieceKind.DONE]


def test_nothing_is_read_after_the_end() -> None:
    meter, pieces = run([text_frame("a") + DONE + usage_frame(), usage_frame(), DONE])

    assert plain(pieces) == text_frame("a")
    assert kinds(pieces) == [PieceKind.DONE]
    assert meter.seen.report is None


def test_an_error_ends_the_stream() -> None:
    error = frame({"error": {"message": "no"}})
    meter, pieces = run([text_frame("a") + error + text_frame("b") + DONE])

    assert plain(pieces) == text_frame("a")
    assert kinds(pieces) == [PieceKind.ERROR]
    assert meter.is_done


def test_a_last_frame_without_its_empty_line_is_taken() -> None:
    for end in ("", "\n", "\r\n"):
        _, pieces = run([text_frame("a") + f"data: [DONE]{end}".encode()])
        assert kinds(pieces) == [PieceKind.DONE]
        meter, pieces = run([text_frame("a"), usage_frame().rstrip() + end.encode()])
        assert kinds(pieces) == [PieceKind.USAGE]
        assert meter.seen.report is not None


def test_half_a_frame_at_the_end_is_dropped() -> None:
    """No client can read it: by the specification an event without its empty line is no event."""
    for half in (b'data: {"choi', b"data: [DO", b"<html>", b'{"error":{}}'):
        _, pieces = run([text_frame("a"), half])
        assert plain(pieces) == text_frame("a")


def test_the_end_of_a_long_frame_is_not_lost_at_the_end_of_the_body() -> None:
    long = text_frame("x" * 300, usage=USAGE).rstrip()
    meter, pieces = run([long[:200], long[200:]], buffer=64)

    assert plain(pieces).startswith(long[:300])
    assert meter.seen.report is not None


def test_between_the_parts_of_a_long_frame_nothing_may_be_written() -> None:
    meter = StreamMeter(buffer_bytes_max=64)
    seen = []
    for chunk in (b"data: ", b"x" * 100, b"x", b"\n\n", b"data: "):
        meter.feed(chunk)
        seen.append(meter.is_mid_frame)

    assert seen == [False, True, True, False, False]


def test_a_body_gives_its_usage_and_its_text() -> None:
    doc = {"id": "c1", "model": "m1", "choices": [{"message": {"content": "hi"}}], "usage": USAGE}
    meter = BodyMeter(json.dumps(doc).encode())

    assert meter.seen.report is not None
    assert meter.seen.report.usage == Usage(input_tokens=7, output_tokens=3)
    assert (meter.seen.model, meter.seen.upstream_id, meter.seen.text()) == ("m1", "c1", "hi")


def test_a_body_that_is_no_json_gives_nothing() -> None:
    for body in (b"", b"<html>", b"[]", b'{"choices":'):
        meter = BodyMeter(body)
        assert meter.answer is None
        assert meter.seen.is_empty
