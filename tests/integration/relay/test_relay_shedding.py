"""A worker that cannot take more says so: to new requests, never to those that run."""

import asyncio
import time
from typing import Any

import pytest

from gateway.shedding import Reason
from tests.support.gateway import eventually, zoo_model
from tests.support.rawclient import RawRequest, connect, exchange
from tests.support.relay import Relay, error_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

SLOW = "plain:tokens=40,chunk_delay_ms=50"
MODELS: dict[str, Any] = {"slow": zoo_model(SLOW), "plain": zoo_model("plain")}
OVERRIDES = {
    "limits__loop_lag_max_ms": 50,
    "limits__loop_lag_for_ms": 400,
    "limits__open_requests_per_worker": 3,
}


def block(block_s: float) -> None:
    time.sleep(block_s)


class Blocker:
    """Holds the event loop up for a while, again and again."""

    def __init__(self, block_s: float) -> None:
        self._block_s = block_s
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while True:
            block(self._block_s)
            await asyncio.sleep(0)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


async def readiness(relay: Relay) -> list[str]:
    answer = await exchange(relay.gateway.origin, RawRequest(method="GET", target="/readyz"))
    return list(answer.json()["failing"])


async def test_a_late_event_loop_refuses_new_requests_and_lets_streams_finish(
    relay: Relay, key: str
) -> None:
    shedding = relay.services.shedding

    async def becomes(reason: str) -> None:
        async def is_it() -> bool | None:
            return shedding.reason == reason or None

        await eventually(is_it)

    async with connect(relay.gateway.base_url, deadline=30) as conn:
        await conn.send(relay.chat(key, "slow", stream=True))
        assert (await conn.head()).status == 200
        blocker = Blocker(0.15)
        await becomes(Reason.LOOP_LAG)
        refused = await relay.call(key, "plain")
        not_ready = await readiness(relay)
        await blocker.stop()
        rest = b"".join([piece.data async for piece in conn.body()])
    await becomes("")
    again = await relay.call(key, "plain")
    ready = await readiness(relay)

    error = error_of(refused)
    assert (refused.status, error["code"]) == (503, "overloaded")
    assert refused.head is not None
    assert refused.head.get("retry-after") == "2"
    assert rest.endswith(b"data: [DONE]\n\n")
    assert again.status == 200
    assert "overloaded" in not_ready  # a loop that is held up may find the till late, too
    assert ready == []
    # The refused one has no receipt: nothing was held.
    receipts = await relay.receipts(key, 2)
    assert [receipt["outcome"] for receipt in receipts] == ["complete", "complete"]


async def test_one_long_pause_refuses_nobody(relay: Relay, key: str) -> None:
    lag = relay.services.metrics.loop_lag._value
    statuses = []

    async def served(is_late: bool) -> bool | None:
        statuses.append((await relay.call(key, "plain")).status)
        return (lag.get() > 0.5) == is_late or None

    block(1.0)
    await eventually(lambda: served(True))
    await eventually(lambda: served(False))

    assert set(statuses) == {200}
    await relay.receipts(key, len(statuses))


async def test_a_worker_takes_no_more_open_requests_than_it_may(relay: Relay, key: str) -> None:
    async def three_open() -> bool | None:
        return relay.services.open_calls == 3 or None

    running = [asyncio.ensure_future(relay.call(key, "slow", stream=True)) for _ in range(3)]
    await eventually(three_open)
    refused = await relay.call(key, "plain")
    answers = await asyncio.gather(*running)

    assert (refused.status, error_of(refused)["code"]) == (503, "unavailable")
    assert [answer.status for answer in answers] == [200] * 3
    await relay.receipts(key, 3)
