"""Long bodies are searched in pieces: what lies across two of them is found all the same."""

import re

import pytest

from gateway.errors import ApiError
from gateway.protocols.bounds import PIECE_BYTES, find_in, is_in, is_swarm, matches_in
from gateway.protocols.chat import read_facts
from gateway.protocols.sse import frames_with, payload_of, split_frames

KEY = re.compile(rb'"(model)"')


@pytest.mark.parametrize("at", [0, *range(PIECE_BYTES - 9, PIECE_BYTES + 2), 2 * PIECE_BYTES])
def test_what_lies_across_two_pieces_is_found_once(at: int) -> None:
    data = b" " * at + b'"model"' + b" " * PIECE_BYTES

    assert is_in(KEY, data)
    assert [match.start() for match in matches_in(KEY, data)] == [at]
    assert find_in(data, b'"model"', 0) == at
    assert find_in(data, b'"model"', at + 1) == -1


@pytest.mark.parametrize("gap", [0, 1, 50, PIECE_BYTES, 2 * PIECE_BYTES])
@pytest.mark.parametrize("at", [0, PIECE_BYTES - 140, PIECE_BYTES - 100, PIECE_BYTES - 50])
def test_parts_of_a_message_are_seen_wherever_they_are(at: int, gap: int) -> None:
    content = b'{"model":"m","messages":[%b{"content"%b:%b[{"type":"input_audio"}]}]}'
    body = content % (b" " * at, b" " * gap, b" " * gap)

    with pytest.raises(ApiError, match="has no price here"):
        read_facts(body)


@pytest.mark.parametrize("space", ["", " ", "\n\t "])
@pytest.mark.parametrize("inside", ["%s", '"stream_options":{%s}', '"x":[{%s}]'])
def test_many_fields_are_refused_however_they_are_written(space: str, inside: str) -> None:
    fields = inside % ",".join(f'"k{number}"{space}:1' for number in range(30_000))

    with pytest.raises(ApiError, match="too many fields"):
        read_facts(f'{{"model":"m",{fields}}}'.encode())


def test_colons_in_prompts_are_no_fields() -> None:
    body = b'{"model":"m","messages":[{"content":"%b"}]}' % (b"12:34:56 " * 100_000)

    assert read_facts(body).model == "m"


def test_a_long_text_is_no_swarm() -> None:
    assert not is_swarm(b'{"choices":[{"message":{"content":"%b"}}]}' % (b"so, " * 300_000))


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\n\r\n"])
def test_frames_are_cut_at_every_empty_line(end: bytes) -> None:
    frames = [b"data: 1" + end, b": c" + end, end, b"data: a\ndata:b" + end]

    # An end right after another one is only told from it when it begins with a line feed.
    assert b"".join(split_frames(b"".join(frames))) == b"".join(frames)
    assert payload_of(frames[0]) == b"1"
    assert payload_of(frames[3]) == b"a\nb"
    assert [payload_of(f) for f in frames_with(b"data", b"".join(frames))] == [b"1", b"a\nb"]
