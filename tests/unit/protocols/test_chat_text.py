"""The text of many frames at once is the text of each of them."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.protocols import sse
from gateway.protocols.chat_answer import texts_in
from gateway.protocols.chat_text import FRAME_BYTES_MAX, FrameTexts

CHUNK = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}


def frame(delta: Any, *, index: int = 0, finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
    separators = (", ", ": ") if more.pop("spaced", False) else (",", ":")
    chunk = {**CHUNK, "choices": [choice], **more}
    data = json.dumps(chunk, ensure_ascii=False, separators=separators)
    return b"data: " + data.encode("utf-8", "surrogatepass") + b"\n\n"


def one_by_one(frames: bytes) -> str:
    """As it was read before: every frame with `choices` parsed."""
    found = sse.frames_with(b'"choices"', frames)
    return "".join(text for one in found for text in texts_in(sse.payload_of(one)))


def at_once(texts: FrameTexts, frames: bytes) -> str:
    return "".join(texts.read(frames))


WORDS = [frame({"content": word}) for word in (" one", " two", " three")]
OPENING = frame({"role": "assistant", "content": "", "refusal": None})
CLOSING = frame({}, finish="stop")
SHAPES = {
    "plain": [OPENING, *WORDS, CLOSING],
    "spaced": [frame({"content": w}, spaced=True, usage=None, obfuscation="A1") for w in "abc"],
    "usage null": [frame({"content": w}, usage=None) for w in "abc"],
    "padded": [frame({"content": w}, obfuscation=w * 9) for w in "abc"],
    "a backslash too many": [WORDS[0], WORDS[1].replace(b"two", b"two\\"), *WORDS],
    "a quote after a backslash": [WORDS[0], WORDS[1].replace(b"two", b'two\\\\"b'), *WORDS],
    "escapes": [frame({"content": w}) for w in ("\n", 'a"b', "\\", "\t\x00", "€🙂", "é")],
    "reasoning": [frame({"reasoning_content": w, "content": None}) for w in "abc"],
    "tools": [
        frame({"tool_calls": [{"index": 0, "function": {"arguments": w}}]}) for w in ("{", '"a"')
    ],
    "two at once": [frame({"content": "a", "refusal": "b"}), frame({"content": "c"})],
    "log probabilities": [frame({"content": w}, logprobs={"content": ["x"]}) for w in "abc"],
    "a clock in each frame": [frame({"content": w}, created=n) for n, w in enumerate("abc" * 30)],
    "choices in turn": [frame({"content": w}, index=n % 2) for n, w in enumerate("abcdef")],
    "text that looks like a frame": [WORDS[0], frame({"content": WORDS[1].decode()}), WORDS[2]],
    "comments": [WORDS[0], b": alive\n\n", WORDS[1], b"\n\n", WORDS[2]],
    "several lines": [WORDS[0], b'data: {"choices":[{"delta":\ndata: {"content":"x"}}]}\n\n'],
    "lists of parts": [frame({"content": [{"type": "text", "text": w}]}) for w in "abc"],
    "no JSON": [WORDS[0], b'data: {"choices":[{"delta":{"content":"\n\n', WORDS[1]],
    "no UTF-8": [WORDS[0], WORDS[1].replace(b"two", b"\xff\xfe"), WORDS[2]],
    "half a character": [WORDS[0], frame({"content": "\ud83d"}), WORDS[2]],
    "a key twice": [
        frame({"content": w}).replace(b'"index"', b'"delta":{"content":"not"},"index"')
        for w in "ab"
    ],
    "a name used elsewhere": [frame({"content": w}, note={"content": w}) for w in "ab"]
    + [b'data: {"note":{"content":"no"},"choices":[{"delta":{"content":"yes"}}]}\n\n'] * 2,
    "long": [WORDS[0], frame({"content": "w" * (FRAME_BYTES_MAX + 1)}), WORDS[1], WORDS[2]],
    "swarm": [WORDS[0], frame({"content": "[" * 120_000}), WORDS[1]],
    "error beside text": [WORDS[0], frame({"content": "x"}, error={"message": "content"})],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ending", [b"\n\n", b"\r\n\r\n"], ids=["lf", "crlf"])
def test_frames_of_every_shape_are_read_as_one_by_one(shape: str, ending: bytes) -> None:
    frames = b"".join(SHAPES[shape]).replace(b"\n\n", ending)
    texts = FrameTexts()
    # Shapes that were learned from other frames do no harm, and neither do their own.
    learned = [at_once(texts, b"".join(WORDS)), at_once(texts, frames), at_once(texts, frames)]

    expected = one_by_one(frames)
    assert learned == [" one two three", expected, expected]
    if shape not in {"lists of parts", "tools", "several lines"}:
        assert expected


@settings(max_examples=400)
@given(
    st.lists(
        st.sampled_from([one for shape in SHAPES.values() for one in shape if len(one) < 1000])
        | st.text(max_size=8).map(lambda text: frame({"content": text}))
        | st.binary(max_size=6).map(lambda data: WORDS[0].replace(b" one", data)),
        max_size=40,
    ),
    st.integers(0, 40),
)
def test_any_mixture_is_read_as_one_by_one(frames: list[bytes], middle: int) -> None:
    texts = FrameTexts()
    first, second = b"".join(frames[:middle]), b"".join(frames[middle:])

    assert at_once(texts, first) == one_by_one(first)
    assert at_once(texts, second) == one_by_one(second)


@pytest.mark.parametrize(
    "shape", ["plain", "spaced", "usage null", "padded", "reasoning", "escapes"]
)
def test_frames_that_are_alike_are_not_parsed(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []

    def counted(data: bytes) -> list[str]:
        parsed.append(data)
        return list(texts_in(data))

    monkeypatch.setattr("gateway.protocols.chat_text.texts_in", counted)
    alike = [one for one in SHAPES[shape] if one not in (OPENING, CLOSING)]
    texts = FrameTexts()
    at_once(texts, alike[0])
    before = len(parsed)

    got = at_once(texts, b"".join(alike * 100))

    assert got == one_by_one(b"".join(alike * 100))
    assert len(parsed) - before == 0
