"""Lines reach their sink whole and in order; a sink that takes nothing makes nobody wait."""

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from config.settings import Log
from gateway import log as lines
from gateway.log import EventLog, LineHandler, set_up_logging
from tests.support.gateway import eventually

events = EventLog("gateway.test")
log = logging.getLogger("gateway.test")


class Facts(msgspec.Struct):
    number: int
    text: str = "ä\n"
    nothing: float | None = None


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A file that all logging goes to, until the test ends."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield tmp_path / "folder" / "a.log"
    for handler in root.handlers:
        if isinstance(handler, LineHandler):
            handler.close()
    root.handlers[:], root.level = before


def read(path: Path) -> list[list[bytes]]:
    return [line.split(b",") for line in path.read_bytes().splitlines()]


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["number"] for line in path.read_bytes().splitlines()]


async def test_a_line_is_what_a_record_would_be(path: Path) -> None:
    set_up_logging(Log(path=str(path)))
    events.info("test.done", Facts(1))
    log.info("test.done", extra=msgspec.structs.asdict(Facts(1)))
    (fast_time, *fast), (usual_time, *usual) = read(path)

    assert fast == usual
    assert len(fast_time) == len(usual_time)
    assert fast_time <= usual_time


async def test_lines_of_one_moment_are_written_together_and_soon(path: Path) -> None:
    set_up_logging(Log(path=str(path)))
    for number in range(10):
        events.info("test.done", Facts(number))
    assert numbers(path) == []

    async def written() -> list[int] | None:
        return numbers(path) or None

    assert await eventually(written) == list(range(10))


async def test_a_record_is_written_at_once_after_what_waits(path: Path) -> None:
    set_up_logging(Log(path=str(path)))
    events.info("test.done", Facts(1))
    log.warning("test.done", extra={"number": 2})
    events.info("test.done", Facts(3))

    assert numbers(path) == [1, 2]


async def test_much_is_written_without_waiting(path: Path) -> None:
    set_up_logging(Log(path=str(path)))
    for number in range(100):
        events.info("test.done", Facts(number, "x" * 1000))

    assert len(numbers(path)) > 50


def test_without_a_loop_nothing_waits(path: Path) -> None:
    set_up_logging(Log(path=str(path)))

    async def once() -> None:
        events.info("test.done", Facts(1))

    asyncio.run(once())
    assert lines._current is not None
    lines._current._late_at_ns = 0  # as if time had passed
    events.info("test.done", Facts(2))
    assert numbers(path) == [1, 2]
    events.info("test.done", Facts(3))
    assert numbers(path) == [1, 2, 3]


def test_the_level_is_honoured(path: Path) -> None:
    set_up_logging(Log(path=str(path), level="warning"))
    events.info("test.done", Facts(1))
    log.warning("test.done", extra={"number": 2})

    assert not events.is_on
    assert numbers(path) == [2]


def test_without_set_up_it_is_a_record(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gateway.test"):
        events.info("test.done", Facts(7))

    [record] = caplog.records
    assert (record.getMessage(), vars(record)["number"]) == ("test.done", 7)


def test_a_record_that_cannot_be_written_harms_nobody(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging(Log(path=str(path)))
    log.warning("test.done", extra={"number": "\ud800"})
    log.warning("test.done", extra={"number": 2})

    assert numbers(path) == [2]
    assert "UnicodeEncodeError" in capsys.readouterr().err


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[LineHandler, int]]:
    """A handler whose sink is a pipe that nobody reads, and the other end."""
    monkeypatch.setattr(lines, "WAITING_BYTES_MAX", 100_000)
    monkeypatch.setattr(lines, "DROPPED_AT_ONCE", 10_000)
    monkeypatch.setattr(lines, "LAST_WAIT_MS", 1)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    handler = LineHandler(f"/dev/fd/{writer}")
    root = logging.getLogger()
    root.addHandler(handler)
    yield handler, reader
    root.removeHandler(handler)
    handler.close()
    os.close(reader)
    os.close(writer)


def taken(handler: LineHandler, reader: int) -> list[dict[str, Any]]:
    """What comes out of the pipe while the handler goes on writing."""
    data = b""
    while True:
        try:
            data += os.read(reader, 1 << 20)
        except BlockingIOError:
            return [json.loads(line) for line in data.splitlines()]
        handler.flush()


def test_a_full_pipe_makes_nobody_wait_and_loses_nothing(pipe: tuple[LineHandler, int]) -> None:
    handler, reader = pipe
    for number in range(8000):
        handler.put(b'{"number":%d}\n' % number, 0)

    assert [line["number"] for line in taken(handler, reader)] == list(range(8000))


def test_above_the_bound_the_oldest_go_and_are_counted(pipe: tuple[LineHandler, int]) -> None:
    handler, reader = pipe
    for number in range(20_000):
        handler.put(b'{"number":%d}\n' % number, 0)
        assert len(handler._waiting) <= 100_000
    came = taken(handler, reader)
    kept = [line["number"] for line in came if "number" in line]
    [told] = [line["lines"] for line in came if line.get("event") == "log.dropped"]

    assert kept[-1] == 19_999
    assert kept == sorted(set(kept))
    assert told == 20_000 - len(kept)


def test_a_sink_that_is_gone_harms_nobody(pipe: tuple[LineHandler, int]) -> None:
    handler, reader = pipe
    with Path(os.devnull).open() as other:
        os.dup2(other.fileno(), reader)
    handler.put(b"{}\n", 0)
    handler.emit(logging.makeLogRecord({"msg": "test.done"}))

    assert handler._waiting.count(b"\n") == 2


SCRIPT = """
import asyncio, sys
import msgspec
from config.settings import Log
from gateway.log import EventLog, set_up_logging

class Facts(msgspec.Struct):
    number: int

async def main():
    EventLog("a").info("test.done", Facts(1))

set_up_logging(Log())
asyncio.run(main())
"""


def test_the_end_of_the_process_writes_what_waits() -> None:
    root = str(Path(__file__).parents[3])
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, check=True, timeout=30
    )

    assert json.loads(ended.stderr)["number"] == 1
