"""Limits per minute in the manner of OpenAI's headers, and the refusal that tells of one."""

import pytest

from billing.errors import RateLimited
from billing.standing import Standing, Standings, read_standings
from gateway.errors import to_api_error
from gateway.rate_headers import duration_text, rate_headers


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0s"),
        (1, "1ms"),
        (999, "999ms"),
        (1000, "1s"),
        (1500, "1.5s"),
        (1001, "1.001s"),
        (59_990, "59.99s"),
        (60_000, "1m0s"),
        (61_020, "1m1.02s"),
        (360_000, "6m0s"),
    ],
)
def test_durations_are_written_as_go_writes_them(ms: int, text: str) -> None:
    assert duration_text(ms) == text


def test_only_limits_that_exist_have_headers() -> None:
    assert rate_headers(Standings()) == []
    assert rate_headers(Standings(tokens=Standing(1000, 7, 59_580))) == [
        (b"x-ratelimit-limit-tokens", b"1000"),
        (b"x-ratelimit-remaining-tokens", b"7"),
        (b"x-ratelimit-reset-tokens", b"59.58s"),
    ]


def test_what_the_till_tells_is_read() -> None:
    assert read_standings(None) == Standings()
    assert read_standings(b"0 0 0 0 0 0") == Standings()
    assert read_standings(b"60 59 1000 0 0 0") == Standings(Standing(60, 59, 1000), None)
    assert read_standings(b"0 0 0 9 8 7") == Standings(None, Standing(9, 8, 7))


@pytest.mark.parametrize(
    ("wait_ms", "wait_s"), [(1, b"1"), (1000, b"1"), (1001, b"2"), (60_000, b"60")]
)
def test_the_time_to_wait_is_rounded_up_to_a_second(wait_ms: int, wait_s: bytes) -> None:
    refusal = RateLimited(
        scope="key",
        kind="requests",
        limit=60,
        retry_after_ms=wait_ms,
        standings=Standings(Standing(60, 0, 60_000)),
    )

    error = to_api_error(refusal)

    headers = dict(error.headers)
    assert (error.status, error.code) == (429, "rate_limited")
    assert headers[b"retry-after"] == wait_s
    assert headers[b"retry-after-ms"] == b"%d" % wait_ms
    assert headers[b"x-ratelimit-remaining-requests"] == b"0"
    assert "This key may have 60 requests per minute" in error.message
    assert "You were not charged." in error.message
