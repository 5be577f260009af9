"""The load against the mock: what it counts, and that it cannot be fooled."""

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.arms import arm_at, running_mock
from bench.client import Connection, Exchange
from bench.histogram import Histogram
from bench.load import Job, Kind, Load, Result
from bench.processes import ChildFailed, child
from bench.shape import Shape


@pytest.fixture
async def mock(tmp_path: Path) -> AsyncIterator[str]:
    async with running_mock(tmp_path, seed=1) as (_, url):
        yield url


def job(url: str, kind: Kind, **more: Any) -> Job:
    arm = arm_at("direct", f"{url}/v1")
    now = time.monotonic()
    return Job(
        **{
            "host": arm.host,
            "port": arm.port,
            "path": arm.path,
            "headers": {},
            "model": "bench",
            "kinds": [kind],
            "connections": 4,
            "start_at": now,
            "warm_until": now + 0.1,
            "end_at": now + 0.5,
            "grace_s": 2.0,
            **more,
        }
    )


def percentile(plain: dict[str, Any], percent: float) -> float:
    found = Histogram.from_plain(plain).percentile(percent)
    assert found is not None
    return found


async def test_an_open_loop_keeps_its_rate_and_counts_no_error(mock: str) -> None:
    result = Load(job(mock, Kind(prompt_bytes=1024), rate=300.0)).run()

    assert result.errors == {}
    assert 70 < result.requests < 190
    assert result.late["count"] == result.latency["count"]


async def test_a_slow_server_cannot_hide_its_queue(mock: str) -> None:
    """One connection that takes 20 ms each, and 100 arrivals a second: most of them wait."""
    slow = Kind(prompt_bytes=512, shape=Shape(first_ms=20))
    result = Load(job(mock, slow, rate=100.0, connections=1, grace_s=5.0)).run()

    assert result.backlog_max > 2
    assert percentile(result.latency, 99) > 40_000


async def test_a_closed_loop_sees_every_frame_of_a_stream(mock: str) -> None:
    kind = Kind(prompt_bytes=512, stream=True, shape=Shape(chunks=10, every_ms=5))
    result = Load(job(mock, kind)).run()

    assert result.errors == {}
    assert result.requests > 4
    assert percentile(result.gap, 50) == pytest.approx(5000, rel=0.5)
    assert percentile(result.transit, 50) < 20_000


async def test_the_kernel_tells_when_an_answer_came_that_is_read_later(mock: str) -> None:
    """The mock answers after 5 ms; the answers are read when the next request is due."""
    slow = Kind(prompt_bytes=512, shape=Shape(first_ms=5))
    load = Load(job(mock, slow, rate=600.0, connections=32))
    result = load.run()

    assert load.is_stamped
    assert result.errors == {}
    assert 100 < result.requests < 400
    assert 4_000 < percentile(result.latency, 50) < 15_000
    # The mock's timer may be a millisecond early; a stamp by another clock would be far away.
    assert percentile(result.latency, 0) > 3_500


def test_frames_of_a_stream_are_read_as_they_come() -> None:
    streams = Kind(prompt_bytes=512, stream=True)
    assert not Load(job("http://127.0.0.1:1", streams, rate=5_000.0)).is_stamped


@pytest.mark.parametrize(
    ("shape", "stream", "problem"),
    [
        (Shape(status=500), False, "status 500"),
        (Shape(chunks=5, cut_after=2), True, "closed in the middle"),
        (Shape(stall_after=0), False, "timed out"),
    ],
)
async def test_failures_are_counted_with_their_reason(
    mock: str, shape: Shape, stream: bool, problem: str
) -> None:
    kind = Kind(prompt_bytes=512, stream=stream, shape=shape)
    result = Load(job(mock, kind, once=True, timeout_s=0.3)).run()

    assert result.errors == {problem: 4}
    assert result.requests == 0


async def test_a_server_that_is_not_there_ends_the_job(mock: str, tmp_path: Path) -> None:
    async with running_mock(tmp_path, seed=1) as (_, gone):
        pass
    with pytest.raises(ConnectionRefusedError):
        Load(job(gone, Kind(prompt_bytes=512))).run()


async def test_the_process_takes_jobs_and_gives_results(mock: str, tmp_path: Path) -> None:
    async with child("load", ("-m", "bench.load"), tmp_path) as process:
        for _ in range(2):
            now = time.monotonic() + 0.1
            line = msgspec.json.encode(
                job(
                    mock,
                    Kind(prompt_bytes=512),
                    start_at=now,
                    warm_until=now,
                    end_at=now + 0.2,
                )
            )
            await process.write(line + b"\n")
            result = msgspec.json.decode(await process.line(10), type=Result)
            assert result.requests > 10


async def test_a_process_that_fails_is_reported_with_what_it_said(tmp_path: Path) -> None:
    async with child("load", ("-m", "bench.load"), tmp_path) as process:
        await process.write(b"nonsense\n")
        with pytest.raises(ChildFailed, match=r"(?s)load ended.*DecodeError"):
            await process.line(10)


class Wire:
    """A connection whose socket gives what a test says."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)

    def recv(self, _: int) -> bytes:
        return self.pieces.pop(0)

    def send(self, data: bytes) -> int:
        return len(data)

    def close(self) -> None:
        pass


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def received(pieces: list[bytes], *, chunks: int = 2) -> Exchange:
    connection = Connection.__new__(Connection)
    connection.is_stamped = False
    connection.sock = Wire(*pieces)  # type: ignore[assignment]
    connection.exchange, connection.is_closed = None, False
    exchange = Exchange(0, True, chunks)
    connection.send(b"request", exchange)
    for _ in pieces:
        connection.read(1)
    return exchange


def frame(number: int) -> bytes:
    data = b'data: {"choices":[{"delta":{"content":"@%d:5@ x"}}]}\n\n' % number
    return b"%x\r\n%b\r\n" % (len(data), data)


DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def test_an_answer_is_understood_however_it_is_cut() -> None:
    whole = HEAD + frame(0) + frame(1) + DONE
    for size in (1, 2, 3, 7, 50, len(whole)):
        exchange = received([whole[at : at + size] for at in range(0, len(whole), size)])
        assert (exchange.judge(), exchange.frames) == ("", 2), size


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (HEAD + frame(0) + DONE, "frames missing"),
        (HEAD + frame(1) + frame(0) + DONE, "frames out of order"),
        (HEAD + frame(0) + frame(1) + b"0\r\n\r\n", "no [DONE]"),
        (HEAD + b"zz\r\n", "bad answer: a chunk without a size"),
        (b"HTTP/1.1 402 No\r\ncontent-length: 2\r\n\r\n{}", "status 402"),
    ],
)
def test_a_wrong_answer_is_no_success(answer: bytes, problem: str) -> None:
    assert received([answer, b""]).judge() == problem
