"""What streams keep for counting is bounded, for each and for all of them together."""

import json
from collections.abc import Iterator

import pytest

from gateway.relay import seen
from gateway.relay.meter import StreamMeter
from gateway.relay.seen import ALL_KEPT, KEPT_BYTES_MAX, KEPT_BYTES_MAX_THEN, Seen

CHUNK = json.dumps(
    {
        "id": "c1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m1",
        "choices": [
            {"index": 0, "delta": {"content": "word "}, "logprobs": None, "finish_reason": None}
        ],
    }
).encode()
FRAME = b"data: %b\n\n" % CHUNK


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """Other tests may have left streams behind that are not collected yet."""
    before, ALL_KEPT.bytes = ALL_KEPT.bytes, 0
    yield
    ALL_KEPT.bytes = before


def fed(frames: int) -> StreamMeter:
    meter = StreamMeter(buffer_bytes_max=1 << 18)
    for _ in range(frames):
        meter.feed(FRAME)
    return meter


def test_a_stream_keeps_its_frames_up_to_a_bound() -> None:
    meter = StreamMeter(buffer_bytes_max=1 << 18)
    most = 0
    for _ in range(1000):
        meter.feed(FRAME)
        assert ALL_KEPT.bytes == meter.seen._kept_bytes
        most = max(most, ALL_KEPT.bytes)

    assert KEPT_BYTES_MAX - len(FRAME) < most <= KEPT_BYTES_MAX
    assert meter.seen.text() == "word " * 1000
    assert ALL_KEPT.bytes == 0


def test_above_the_bound_of_all_each_keeps_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "ALL_KEPT_BYTES_MAX", 200_000)
    meters = []
    for _ in range(50):
        meters.append(fed(300))
        assert ALL_KEPT.bytes <= 200_000 + KEPT_BYTES_MAX + len(meters) * KEPT_BYTES_MAX_THEN
    # Who kept much before gives it back with the next frame.
    for meter in meters:
        meter.feed(FRAME)

    assert ALL_KEPT.bytes <= 200_000
    assert all(meter.seen.text() == "word " * 301 for meter in meters)
    assert all(meter.seen.model == "m1" for meter in meters)
    # Folded text is short, and in few pieces.
    assert all(len(meter.seen._texts) < 60 for meter in meters)


def test_what_a_stream_kept_is_given_back_when_it_is_settled_or_forgotten() -> None:
    one, other = fed(100).seen, fed(100).seen
    assert ALL_KEPT.bytes == 200 * len(FRAME)
    one.release()
    one.release()
    assert ALL_KEPT.bytes == 100 * len(FRAME)
    del other

    assert ALL_KEPT.bytes == 0


def test_text_is_cut_at_its_bound_wherever_frames_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "TEXT_CHARS_MAX", 10)
    one = Seen()
    one.add_text(["abc", "defgh"])
    one.add_text(["ijk", "l"])
    one.add_text(["m"])

    assert one.text() == "abcdefghij"
    assert one.chars_beyond == 3


def test_text_can_be_had_from_any_place_and_cut_at_its_end() -> None:
    one = Seen()
    for text in ("ab", "cdé", "f"):
        one.add_text([text])

    assert [one.text_after(chars) for chars in (0, 1, 2, 4, 6, 9)] == [
        *("abcdéf", "bcdéf", "cdéf", "éf", "", "")
    ]
    assert (one.chars, one.text_bytes) == (6, 7)
    one.cut(2)
    assert (one.text(), one.chars, one.text_bytes) == ("abcd", 4, 4)
    one.cut(0)
    assert one.text() == "abcd"


def test_what_is_cut_is_taken_from_beyond_the_bound_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "TEXT_CHARS_MAX", 4)
    one = Seen()
    one.add_text(["abcdef"])
    one.cut(3)

    assert (one.text(), one.chars_beyond) == ("abc", 0)


def test_it_is_seen_which_choices_are_finished() -> None:
    meter = StreamMeter(buffer_bytes_max=1 << 18)
    end = FRAME.replace(b'"index": 0', b'"index": 2').replace(
        b'"finish_reason": null', b'"finish_reason": "stop"'
    )
    for frame in (FRAME, end, FRAME):
        meter.feed(frame)
    meter.seen.fold()

    assert meter.seen.finished == {2}
