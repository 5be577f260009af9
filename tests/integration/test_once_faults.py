"""`Idempotency-Key` while a store is away, or a worker is slow or stopped."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from billing.errors import IdempotencyInFlight
from billing.fleet import PoolBook
from billing.idempotency import claim_of
from config.ids import new_id
from gateway.relay.once import Claims
from gateway.supervise import Tasks
from tests.support.books import make_account, open_pool
from tests.support.faultproxy import FaultProxy, Mode, running_proxy
from tests.support.gateway import Gateway, eventually, make_settings, running_gateway, zoo_model
from tests.support.tills import running_till
from tests.support.upstream.launch import Upstream

BODY = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}
ONCE = {"idempotency-key": "token"}


@asynccontextmanager
async def client_of(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {await gateway.key()}"}
    async with httpx.AsyncClient(base_url=gateway.base_url, headers=headers) as client:
        assert (await post(client, once=False)).status_code == 200
        await gateway.at_rest()
        yield client


async def post(client: httpx.AsyncClient, *, once: bool = True) -> httpx.Response:
    return await client.post("/chat/completions", json=BODY, headers=ONCE if once else {})


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def served(client: httpx.AsyncClient) -> httpx.Response:
    """The same request again until it is served; meanwhile it may be told to wait."""

    async def probe() -> httpx.Response | None:
        answer = await post(client)
        if answer.status_code != 200:
            assert code(answer) in {(503, "unavailable"), (409, "idempotency_in_flight")}
            return None
        return answer

    answer = await eventually(probe)
    assert isinstance(answer, httpx.Response)
    return answer


def fail(proxy: FaultProxy, fault: str) -> None:
    if fault == "refuse":
        proxy.refuse()
    else:
        proxy.both(Mode.STALL)


@pytest.mark.parametrize("fault", ["refuse", "stall"])
async def test_without_the_book_only_those_who_need_it_are_refused(
    book_url: str,
    till_url: str,
    upstream: Upstream,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.relay.once.BOOK_WAIT_S", 0.3)
    async with (
        running_proxy(book_url) as (proxy, url),
        running_gateway(url, till_url, upstream.base_url) as gateway,
        client_of(gateway) as client,
    ):
        fail(proxy, fault)
        refused, unaware = await post(client), await post(client, once=False)
        proxy.heal()
        monkeypatch.undo()  # a first connection after the healing may take longer than that
        await served(client)
        await gateway.at_rest()
        again = await post(client)
        rows = await gateway.receipts(3)

    assert (code(refused), unaware.status_code) == ((503, "unavailable"), 200)
    assert "Idempotency-Key" in refused.json()["error"]["message"]
    assert "not charged" in refused.json()["error"]["message"]
    assert code(again) == (409, "idempotency_completed")
    assert upstream.stats()["requests"] == 3
    assert {row["outcome"] for row in rows} == {"complete"}


async def test_without_the_till_the_key_is_left_to_the_next(
    book_url: str, till_url: str, upstream: Upstream
) -> None:
    async with (
        running_proxy(till_url) as (proxy, url),
        running_gateway(book_url, url, upstream.base_url) as gateway,
        client_of(gateway) as client,
    ):
        # The answer is lost: the hold may be there, and a free receipt ends it.
        proxy.to_client.mode = Mode.SWALLOW
        refused = await post(client)
        left = await gateway.pool.fetchval("SELECT count(*) FROM idempotent_requests")
        proxy.heal()
        await gateway.at_rest()
        await served(client)
        await gateway.at_rest()
        outcomes = await gateway.pool.fetch("SELECT outcome, price_nanos FROM charge_receipts")

    assert code(refused) == (503, "unavailable")
    assert left == 0
    assert sum(row["outcome"] == "complete" for row in outcomes) == 2
    assert all(row["outcome"] in {"complete", "voided"} for row in outcomes)
    assert upstream.stats()["requests"] == 2


async def test_a_request_that_took_too_long_to_admit_does_not_run(
    gateway: Gateway, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its claim may soon count as abandoned: another could run beside it."""
    async with client_of(gateway) as client:
        with monkeypatch.context() as patched:
            patched.setattr("gateway.relay.pipeline.ADMITTED_WITHIN_S", -1.0)
            refused = await post(client)
        left = await gateway.pool.fetchval("SELECT count(*) FROM idempotent_requests")
        answer = await post(client)
        await gateway.at_rest()
        rows = await gateway.receipts(3)

    assert (code(refused), left, answer.status_code) == ((503, "unavailable"), 0, 200)
    assert sorted(row["outcome"] for row in rows) == ["complete", "complete", "voided"]
    assert upstream.stats()["requests"] == 2


async def test_a_request_that_is_cut_off_while_it_claims_leaves_the_key(
    book_url: str, till_url: str, upstream: Upstream
) -> None:
    async with (
        running_proxy(book_url) as (proxy, url),
        running_gateway(url, till_url, upstream.base_url) as gateway,
        client_of(gateway) as client,
    ):
        proxy.to_client.mode = Mode.STALL
        waiting = asyncio.ensure_future(post(client))

        async def claiming() -> asyncio.Task[object] | None:
            return next((task for task in asyncio.all_tasks() if "claim" in task.get_name()), None)

        claim = await eventually(claiming)
        (serving,) = (task for task in asyncio.all_tasks() if "Protocol._serve" in repr(task))
        serving.cancel()
        await asyncio.wait([serving])
        assert not claim.done()
        proxy.heal()
        await asyncio.wait([waiting])

        async def left() -> bool | None:
            query = "SELECT count(*) FROM idempotent_requests"
            return None if await gateway.pool.fetchval(query) else True

        await asyncio.wait([claim])
        await eventually(left)
        assert (await post(client)).status_code == 200
        await gateway.receipts(2)

    assert upstream.stats()["requests"] == 2


async def test_more_claims_than_may_wait_are_refused(
    book_url: str, till_url: str, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.relay.once.CLAIMS_WAITING_MAX", 3)
    settings = make_settings(upstream.base_url, {"plain": zoo_model("plain")})
    async with (
        running_proxy(book_url) as (proxy, url),
        running_gateway(url, till_url, upstream.base_url, settings) as gateway,
        client_of(gateway) as client,
    ):
        proxy.both(Mode.STALL)
        sending = [asyncio.ensure_future(post(client)) for _ in range(8)]
        done, _ = await asyncio.wait(sending, return_when=asyncio.FIRST_COMPLETED)
        proxy.heal()
        answers = await asyncio.gather(*sending)
        await gateway.at_rest()

    assert {code(task.result()) for task in done} == {(503, "unavailable")}
    assert sum(answer.status_code == 200 for answer in answers) <= 1
    assert sum("busy" in answer.text for answer in answers) == 5
    assert upstream.stats()["requests"] <= 2


async def test_a_claim_that_never_reached_the_book_leaves_nothing_to_release(
    book_url: str, till_url: str, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the book stalls, each of many refused requests would leave a task behind."""
    monkeypatch.setattr("gateway.relay.once.CLAIMS_WAITING_MAX", 5)
    monkeypatch.setattr("gateway.relay.once.BOOK_WAIT_S", 0.1)
    settings = make_settings(upstream.base_url, {"plain": zoo_model("plain")})

    def releasing() -> int:
        return sum("release" in task.get_name() for task in asyncio.all_tasks())

    async def none_left() -> bool | None:
        return None if releasing() else True

    async with (
        running_proxy(book_url) as (proxy, url),
        running_gateway(url, till_url, upstream.base_url, settings) as gateway,
        client_of(gateway) as client,
    ):
        proxy.both(Mode.STALL)
        answers = [await asyncio.gather(*(post(client) for _ in range(10))) for _ in range(3)]
        left = releasing()
        proxy.heal()
        await eventually(none_left)
        await served(client)
        await gateway.at_rest()

    assert {code(answer) for part in answers for answer in part} == {(503, "unavailable")}
    assert left <= 5


async def test_a_till_that_nobody_made_sure_of_frees_no_key(book_url: str, till_url: str) -> None:
    """It may be restarted with old content, in which a request that runs is not known."""
    tasks = Tasks()
    async with (
        open_pool(book_url) as pool,
        running_till(till_url, PoolBook(pool, "w_one")) as till,
        running_till(till_url, PoolBook(pool, "w_two")) as reconnected,
    ):
        account = await make_account(pool)
        await till.learn_epoch()
        first, second = (claim_of(account.virtual_key_id, b"k", b"{}", new_id()) for _ in "12")
        await Claims(pool, till, tasks, 600).take(account.scopes, first)
        await pool.execute("UPDATE idempotent_requests SET created_at = now() - interval '100 s'")
        await pool.execute("UPDATE till_epoch SET changed_at = now() - interval '200 s'")
        claims = Claims(pool, reconnected, tasks, 600)

        with pytest.raises(IdempotencyInFlight):
            await claims.take(account.scopes, second)
        await reconnected.learn_epoch()
        await claims.take(account.scopes, second)
        await tasks.close()
