"""Frames of event streams."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.protocols import sse


@pytest.mark.parametrize(
    ("data", "length"),
    [
        (b"", 0),
        (b"data: a", 0),
        (b"data: a\n", 0),
        (b"data: a\r\n\r", 0),
        (b"data: a\n\n", 9),
        (b"data: a\r\n\r\n", 11),
        (b"data: a\n\nda", 9),
        (b"data: a\r\n\r\nda", 11),
        (b"a\n\nb\r\n\r\nc", 8),
        (b"a\r\n\r\nb\n\nc", 8),
        (b"a\n\r\nb", 4),
    ],
)
def test_only_complete_frames_are_complete(data: bytes, length: int) -> None:
    assert sse.complete_length(data) == length


def test_frames_are_split_after_their_empty_lines() -> None:
    assert sse.split_frames(b"a\n\nb\r\n\r\n:c\n\n") == [b"a\n\n", b"b\r\n\r\n", b":c\n\n"]


@pytest.mark.parametrize("complete", [b"a\n\n\n", b"a\n\n\r\n", b"a\r\n\r\n\r\n", b"\n\n\n"])
def test_an_empty_line_too_many_is_no_failure(complete: bytes) -> None:
    """Found: it failed an assertion, and the stream with it."""
    frames = sse.split_frames(complete)

    assert b"".join(frames) == complete
    assert [payload for frame in frames if (payload := sse.payload_of(frame))] == []


@settings(deadline=None)
@given(st.lists(st.sampled_from([b"\n", b"\r\n", b"data: a", b": c", b"x"])).map(b"".join))
def test_frames_joined_are_the_data(data: bytes) -> None:
    complete = data[: sse.complete_length(data)]

    assert b"".join(sse.split_frames(complete)) == complete


@pytest.mark.parametrize(
    ("frame", "payload"),
    [
        (b"data: {}\n\n", b"{}"),
        (b"data:{}\n\n", b"{}"),
        (b"data: {}\r\n\r\n", b"{}"),
        (b"event: x\ndata: {}\nid: 1\n\n", b"{}"),
        (b"data: {\ndata: }\n\n", b"{\n}"),
        (b"data: {\r\ndata: }\r\n\r\n", b"{\n}"),
        (b": comment\n\n", b""),
        (b"data\n\n", b""),
    ],
)
def test_the_payload_is_what_a_client_would_read(frame: bytes, payload: bytes) -> None:
    assert sse.payload_of(frame) == payload


@pytest.mark.parametrize(
    "frame",
    [
        b"data: {a}\n\n",
        b"event: x\r\ndata: {a}\r\n\r\n",
        b"event: x\ndata: {\ndata: a\ndata: }\n\n",
    ],
)
@pytest.mark.parametrize("new", [b'{"b":1}', b'{\n"b":1}'])
def test_another_payload_leaves_the_rest_of_a_frame(frame: bytes, new: bytes) -> None:
    if b"\n" in new and frame.count(b"data:") == 1:
        return  # a payload of one line is never exchanged for one of several
    changed = sse.with_payload(frame, sse.payload_of(frame), new)

    assert sse.payload_of(changed) == new
    assert (b"event: x" in changed) == (b"event: x" in frame)
    assert sse.complete_length(changed) == len(changed)


@pytest.mark.parametrize(
    ("data", "matters"),
    [
        (b'data: {"choices":[{"delta":{"content":"usage error [DONE"}}]}\n\n', False),
        (b'data: {"choices":[{"delta":{"content":"\\"usage\\""}}]}\n\n', False),
        (b'data: {"choices":[],"usage":null}\n\n', False),
        (b'data: {"choices":[],"usage": null}\n\n', False),
        (b'data: {"usage":null}\n\ndata: {"usage":{}}\n\n', True),
        (b'data: {"usage" : null}\n\n', True),
        (b'data: {"error":{}}\n\n', True),
        (b"data: [DONE]\n\n", True),
    ],
)
def test_only_frames_that_may_matter_are_looked_into(data: bytes, matters: bool) -> None:
    assert sse.may_matter(data) is matters
