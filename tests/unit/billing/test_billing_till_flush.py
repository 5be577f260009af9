"""What a tick sends leaves as one write; `forwarded_soon` tells when the mark is in it."""

import asyncio
from uuid import uuid4

import pytest

from billing.errors import TillUnavailable
from billing.till import Scripts, Till
from billing.till_link import TillLink, _Connection
from billing.till_scopes import spend_scopes
from tests.support.tills import Said

SCRIPTS = Scripts()
SCOPES = spend_scopes(uuid4(), uuid4())


class Wire:
    """In place of a transport: what was written."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def abort(self) -> None:
        pass


def make_till() -> Till:
    link = TillLink("redis://localhost", [], call_timeout_s=1, stall_timeout_s=1, pending_max=1000)
    return Till(link, SCRIPTS, Said(), worker="w", lease_ms=1000)


def connect(till: Till) -> tuple[_Connection, Wire]:
    connection, wire = _Connection(1), Wire()
    connection.connection_made(wire)  # type: ignore[arg-type]
    till.link._connection = connection
    return connection, wire


async def test_the_marks_of_one_tick_are_one_write() -> None:
    till = make_till()
    connection, wire = connect(till)
    settled = till.settle(SCOPES, "s", 5, b"{}")
    marks = [till.forwarded_soon(SCOPES, f"r{n}") for n in range(10)]
    assert not any(mark.done() for mark in marks)
    await asyncio.gather(*marks)
    [data] = wire.writes
    connection.connection_lost(None)

    assert data.count(b"EVALSHA") == 11
    assert [data.index(b"h:r%d\r\n" % n) for n in range(10)] == sorted(
        data.index(b"h:r%d\r\n" % n) for n in range(10)
    )
    with pytest.raises(TillUnavailable):
        await settled


async def test_one_who_is_cancelled_holds_up_nobody_else() -> None:
    till = make_till()
    connection, wire = connect(till)
    first, second = (till.forwarded_soon(SCOPES, name) for name in ("a", "b"))
    first.cancel()
    await second
    connection.connection_lost(None)

    assert len(wire.writes) == 1


async def test_without_a_connection_nobody_waits() -> None:
    mark = make_till().forwarded_soon(SCOPES, "r")

    assert mark.done()
    assert mark.result() is None


async def test_a_connection_that_is_lost_before_the_flush_keeps_nobody_waiting() -> None:
    till = make_till()
    connection, wire = connect(till)
    mark = till.forwarded_soon(SCOPES, "r")
    connection.connection_lost(None)
    await mark
    after = till.forwarded_soon(SCOPES, "r")

    assert wire.writes == []
    assert after.done()


async def test_forwarded_is_handed_over_when_it_returns() -> None:
    till = make_till()
    connection, wire = connect(till)
    mark = till.forwarded_soon(SCOPES, "a")
    till.forwarded(SCOPES, "b")
    connection.connection_lost(None)

    assert len(wire.writes) == 1
    assert mark.done()
