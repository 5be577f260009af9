"""The price book in Postgres: versions are added, never changed, by any number of processes."""

import asyncio
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from billing import book, prices_store
from billing.book import Pool
from billing.prices import PriceBook, Rates
from billing.prices_store import load_prices, sync_config_prices
from tests.support.books import open_pool

RATES = Rates(
    input_rate=1,
    output_rate=2,
    cached_input_rate=3,
    cache_write_rate=4,
    reasoning_rate=5,
    audio_input_rate=6,
)


async def load(pool: Pool) -> PriceBook:
    async with book.acquire(pool) as conn:
        return await load_prices(conn)


async def sync(pool: Pool, **wanted: Rates) -> list[str]:
    async with book.acquire(pool) as conn:
        return await sync_config_prices(conn, wanted)


def rate(number: int) -> Rates:
    return msgspec.structs.replace(RATES, input_rate=number)


def now() -> datetime:
    return datetime.now(UTC)


async def test_prices_of_the_config_come_back_as_they_went(book_url: str) -> None:
    async with open_pool(book_url) as pool:
        changed = await sync(pool, a=RATES, b=rate(9))
        prices = await load(pool)

    assert changed == ["a", "b"]
    found = prices.at("a", now())
    assert found is not None
    assert (found.rates, found.model, found.source) == (RATES, "a", "config")
    assert prices.at("c", now()) is None


async def test_the_same_prices_again_write_nothing(book_url: str) -> None:
    async with open_pool(book_url) as pool:
        await sync(pool, a=RATES)
        assert await sync(pool, a=RATES) == []
        assert await pool.fetchval("SELECT count(*) FROM model_prices") == 1


async def test_a_changed_price_is_a_new_version_from_now_on(book_url: str) -> None:
    async with open_pool(book_url) as pool:
        await sync(pool, a=RATES)
        first = (await load(pool)).at("a", now())
        assert await sync(pool, a=rate(7)) == ["a"]
        second = (await load(pool)).at("a", now())
        assert await sync(pool, a=RATES) == ["a"]
        third = (await load(pool)).at("a", now())

    assert first is not None
    assert second is not None
    assert third is not None
    assert [v.rates.input_rate for v in (first, second, third)] == [1, 7, 1]
    assert first.price_version < second.price_version < third.price_version


async def test_operator_rows_win_and_may_begin_later(book_url: str) -> None:
    async with open_pool(book_url) as pool:
        await sync(pool, a=RATES)
        for minutes, number in ((60, 50), (-60, 40), (-90, 30)):
            row = (now() + timedelta(minutes=minutes), number)
            await pool.execute(
                "INSERT INTO model_prices (model, source, effective_from, input_rate, output_rate, "
                "cached_input_rate, cache_write_rate, reasoning_rate) "
                "VALUES ('a', 'operator', $1, $2, 0, 0, 0, 0)",
                *row,
            )
        assert await sync(pool, a=RATES) == []
        prices = await load(pool)

    at_once, later = prices.at("a", now()), prices.at("a", now() + timedelta(hours=2))
    assert at_once is not None
    assert later is not None
    assert (at_once.rates.input_rate, later.rates.input_rate) == (40, 50)


async def test_many_processes_that_start_at_once_write_one_version(book_url: str) -> None:
    async with open_pool(book_url, 6) as pool:
        changed = await asyncio.gather(*(sync(pool, a=RATES, b=rate(9)) for _ in range(12)))
        assert sorted(filter(None, changed)) == [["a", "b"]]
        assert await pool.fetchval("SELECT count(*) FROM model_prices") == 2


async def test_who_waited_for_the_lock_dates_its_prices_after_those_before_it(
    book_url: str,
) -> None:
    """Dated by the start of its transaction, the last writer's price lost to the first's."""
    async with open_pool(book_url, 4) as pool, pool.acquire() as holder:
        async with holder.transaction():
            await holder.execute("SELECT pg_advisory_xact_lock($1)", prices_store.PRICES_LOCK)
            waiting = asyncio.ensure_future(sync(pool, a=rate(2)))
            query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            async with asyncio.timeout(10):
                while not await pool.fetchval(query):
                    assert not waiting.done()
            await holder.execute(
                prices_store.INSERT_PRICE,
                *("a", "config", await holder.fetchval("SELECT clock_timestamp()")),
                *(1, 0, 0, 0, 0, None, None),
            )
        assert await waiting == ["a"]
        found = (await load(pool)).at("a", now())

    assert found is not None
    assert found.rates.input_rate == 2


@pytest.mark.parametrize("late", [timedelta(minutes=5), timedelta(minutes=-5)])
async def test_a_worker_whose_clock_is_wrong_knows_the_price(
    book_url: str, monkeypatch: pytest.MonkeyPatch, late: timedelta
) -> None:
    """A model priced a moment ago was refused as unpriced by a worker that was late."""
    monkeypatch.setattr(prices_store, "utc_now", lambda: now() - late)
    async with open_pool(book_url) as pool:
        await sync(pool, a=RATES)
        await sync(pool, a=rate(7))
        found = (await load(pool)).at("a", now() - late)

    assert found is not None
    assert found.rates.input_rate == 7
