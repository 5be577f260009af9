"""The frames by which a stream is ended before its provider ended it."""

import json

from gateway.protocols.chat_end import Envelope, finished_choices, length_frames

ENVELOPE = Envelope(id="c1", created=7, model="m")


def read(frames: bytes) -> list[dict[str, object]]:
    return [json.loads(frame.removeprefix(b"data: ")) for frame in frames.split(b"\n\n")[:-1]]


def test_each_choice_that_is_cut_off_has_a_frame_of_its_own() -> None:
    choice: dict[str, object] = {"delta": {}, "logprobs": None, "finish_reason": "length"}
    common = {"id": "c1", "object": "chat.completion.chunk", "created": 7, "model": "m"}

    assert read(length_frames(ENVELOPE, [0, 2], wants_usage=False)) == [
        {**common, "choices": [{"index": 0, **choice}]},
        {**common, "choices": [{"index": 2, **choice}]},
    ]
    (frame,) = read(length_frames(ENVELOPE, [0], wants_usage=True))
    assert frame["usage"] is None


def test_finished_choices_are_found_whatever_stands_around_them() -> None:
    frames = (
        b'data: {"choices":[{"index":0,"finish_reason":null}]}\n\n'
        b'data: {"choices": [{"index": 1, "finish_reason": "stop"}]}\r\n\r\n'
        b'data: {"choices":[{"finish_reason":"length"}]}\n\n'
        b'data: {"choices":[{"index":3,"delta":{"content":"\\"finish_reason\\":\\"stop\\""}}]}\n\n'
        b'data: {"choices":[{"index":4,"finish_reason":"stop"\n\n'
    )

    assert set(finished_choices(frames)) == {0, 1}
    assert set(finished_choices(length_frames(ENVELOPE, [5], wants_usage=True))) == {5}
