"""Buckets of the till for what is not a request: one key each, that ends by itself."""

import asyncio

import pytest

from billing.errors import TillUnavailable
from billing.till_rates import Limiter, rate_script
from tests.support.gateway import eventually
from tests.support.tills import running_link


async def test_a_window_has_so_many_and_then_one_after_the_other(till_url: str) -> None:
    async with running_link(till_url) as link:
        limiter = Limiter(link, rate_script())
        answers = [await limiter.take("login:192.0.2.1", 7, 60) for _ in range(8)]
        other = await limiter.take("login:192.0.2.2", 7, 60)
        first = int(await link.command(("PTTL", "fb:rate:login:192.0.2.1")))

    assert [allowed for allowed, _ in answers] == [True] * 7 + [False]
    assert all(wait_ms == 0 for _, wait_ms in answers[:7])
    assert 8000 < answers[7][1] <= 8572
    assert other == (True, 0)
    assert 0 < first <= 60_000


async def test_a_no_takes_nothing_and_the_wait_is_exact(till_url: str) -> None:
    async with running_link(till_url) as link:
        limiter = Limiter(link, rate_script())
        for _ in range(20):
            assert (await limiter.take("x", 20, 1))[0]
        refused = [await limiter.take("x", 20, 1) for _ in range(50)]
        last = min(wait_ms for _, wait_ms in refused)
        await asyncio.sleep(last / 1000)
        assert await limiter.take("x", 20, 1) == (True, 0)

    assert 0 < last <= 50


async def test_more_can_be_taken_at_once(till_url: str) -> None:
    async with running_link(till_url) as link:
        limiter = Limiter(link, rate_script())
        assert await limiter.take("x", 10, 60, 8) == (True, 0)
        allowed, wait_ms = await limiter.take("x", 10, 60, 5)
        assert await limiter.take("x", 10, 60, 2) == (True, 0)

    assert not allowed
    assert 17_000 < wait_ms <= 18_000


async def test_two_instances_share_a_bucket(till_url: str) -> None:
    async with running_link(till_url) as one, running_link(till_url) as other:
        limiters = [Limiter(link, rate_script()) for link in (one, other)]
        calls = [limiter.take("x", 9, 3600) for _ in range(50) for limiter in limiters]
        answers = await asyncio.gather(*calls)

    assert sum(allowed for allowed, _ in answers) == 9


async def test_a_full_bucket_is_no_bucket(till_url: str) -> None:
    async with running_link(till_url) as link:
        limiter = Limiter(link, rate_script())
        await limiter.take("x", 20, 1)

        async def is_gone() -> bool | None:
            return None if await link.command(("EXISTS", "fb:rate:x")) else True

        await eventually(is_gone)


async def test_a_clock_that_went_back_locks_nobody_out(till_url: str) -> None:
    async with running_link(till_url) as link:
        await link.command(("SET", "fb:rate:x", 9_000_000_000_000_000))

        assert await Limiter(link, rate_script()).take("x", 1, 60) == (True, 0)


async def test_without_the_till_nothing_may_happen() -> None:
    async with running_link("redis://127.0.0.1:1", wait=False) as link:
        with pytest.raises(TillUnavailable):
            await Limiter(link, rate_script()).take("x", 1, 60)
