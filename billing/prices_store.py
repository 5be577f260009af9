"""The price book in Postgres: every set of rates a model ever had, append-only."""

from collections.abc import Mapping
from datetime import datetime

import asyncpg

from billing.book import Connection, translated
from billing.prices import PriceBook, PriceVersion, Rates
from config.clock import utc_now

# Any constant will do; it must only differ from other advisory locks of this database.
PRICES_LOCK = 0x7072696365

LOCK_PRICES = "SELECT pg_advisory_xact_lock($1)"
# Versions replaced long ago are needed to recompute old receipts, not to price new calls.
SELECT_PRICES = """
SELECT
    price_version, model, source, effective_from, input_rate, output_rate, cached_input_rate,
    cache_write_rate, reasoning_rate, audio_input_rate, audio_output_rate
FROM model_prices AS p
WHERE effective_from >= (
    SELECT coalesce(max(c.effective_from), '-infinity'::timestamptz)
    FROM model_prices AS c
    WHERE c.model = p.model AND c.source = p.source AND c.effective_from <= $1
)
ORDER BY price_version
"""
INSERT_PRICE = """
INSERT INTO model_prices (
    model, source, effective_from, input_rate, output_rate, cached_input_rate,
    cache_write_rate, reasoning_rate, audio_input_rate, audio_output_rate
)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
"""
# now() is the start of the transaction: with two at once, the moment before the wait for the lock.
SELECT_NOW = "SELECT clock_timestamp()"


async def load_prices(conn: Connection) -> PriceBook:
    """The versions in force now and those that will be."""
    asked_at = utc_now()
    async with translated():
        now: datetime = await conn.fetchval(SELECT_NOW)
        rows = await conn.fetch(SELECT_PRICES, now)
    return PriceBook([_version(row) for row in rows], book_ahead=now - asked_at)


async def sync_config_prices(conn: Connection, wanted: Mapping[str, Rates]) -> list[str]:
    """Make the config's prices the book's from now on; returns the models whose rates changed.

    Idempotent; several processes may start at once. A model that left the config keeps its
    versions: its receipts name them.
    """
    async with translated(), conn.transaction():
        await conn.execute(LOCK_PRICES, PRICES_LOCK)
        now: datetime = await conn.fetchval(SELECT_NOW)
        rows = await conn.fetch(SELECT_PRICES, now)
        book = PriceBook([_version(row) for row in rows if row["source"] == "config"])
        changed = []
        for model, rates in wanted.items():
            current = book.at(model, now)
            if current is None or current.rates != rates:
                changed.append(model)
                await conn.execute(INSERT_PRICE, model, "config", now, *_rate_values(rates))
    return changed


SELECT_PRICE = """
SELECT
    price_version, model, source, effective_from, input_rate, output_rate, cached_input_rate,
    cache_write_rate, reasoning_rate, audio_input_rate, audio_output_rate
FROM model_prices
WHERE price_version = $1
"""


async def find_rates(conn: Connection, price_version: int) -> Rates | None:
    """The rates of a version, however old; None when there is no such version."""
    async with translated():
        row = await conn.fetchrow(SELECT_PRICE, price_version)
    return None if row is None else _version(row).rates


def _rate_values(rates: Rates) -> tuple[int | None, ...]:
    return (
        rates.input_rate,
        rates.output_rate,
        rates.cached_input_rate,
        rates.cache_write_rate,
        rates.reasoning_rate,
        rates.audio_input_rate,
        rates.audio_output_rate,
    )


def _version(row: asyncpg.Record) -> PriceVersion:
    return PriceVersion(
        price_version=row["price_version"],
        model=row["model"],
        source=row["source"],
        effective_from=row["effective_from"],
        rates=Rates(
            input_rate=row["input_rate"],
            output_rate=row["output_rate"],
            cached_input_rate=row["cached_input_rate"],
            cache_write_rate=row["cache_write_rate"],
            reasoning_rate=row["reasoning_rate"],
            audio_input_rate=row["audio_input_rate"],
            audio_output_rate=row["audio_output_rate"],
        ),
    )
