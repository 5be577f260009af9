"""The price book in memory, and what a call is charged by it."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from math import ceil

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.prices import NOTHING, CostSource, PriceBook, PriceVersion, Rates, charge_for
from billing.usage import Usage

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
RATE = st.integers(0, 10**12)
RATES = st.builds(
    Rates,
    input_rate=RATE,
    output_rate=RATE,
    cached_input_rate=RATE,
    cache_write_rate=RATE,
    reasoning_rate=RATE,
    audio_input_rate=st.none() | RATE,
    audio_output_rate=st.none() | RATE,
)
COUNT = st.integers(0, 10**6)
USAGES = st.builds(Usage, **dict.fromkeys(Usage.__struct_fields__, COUNT)).map(Usage.within_totals)
REPORTED = st.none() | st.decimals(0, 1000, allow_nan=False, places=15)
MARKUPS = st.integers(10_000, 1_000_000)


def version(
    number: int, minutes: int, *, source: str = "config", model: str = "m", rate: int = 0
) -> PriceVersion:
    rates = Rates(
        input_rate=rate,
        output_rate=rate,
        cached_input_rate=rate,
        cache_write_rate=rate,
        reasoning_rate=rate,
    )
    return PriceVersion(
        price_version=number,
        model=model,
        source=source,
        effective_from=NOON + timedelta(minutes=minutes),
        rates=rates,
    )


def at(book: PriceBook, minutes: int, model: str = "m") -> int | None:
    found = book.at(model, NOON + timedelta(minutes=minutes))
    return None if found is None else found.price_version


def test_the_newest_version_in_force_is_used() -> None:
    book = PriceBook([version(3, 20), version(1, 0), version(2, 10)])

    assert [at(book, minutes) for minutes in (-1, 0, 9, 10, 19, 20, 999)] == [
        None,
        1,
        1,
        2,
        2,
        3,
        3,
    ]


def test_operator_rows_win_once_they_are_in_force() -> None:
    book = PriceBook([version(1, 0), version(2, 10, source="operator"), version(3, 20)])

    assert [at(book, minutes) for minutes in (5, 10, 25)] == [1, 2, 2]


def test_of_two_rows_of_one_moment_the_later_written_wins() -> None:
    assert at(PriceBook([version(8, 0), version(7, 0)]), 0) == 8
    assert at(PriceBook([version(7, 0), version(8, 0)]), 0) == 8


def test_models_do_not_mix() -> None:
    book = PriceBook([version(1, 0), version(2, 0, model="other")])

    assert (at(book, 0), at(book, 0, "other"), at(book, 0, "none")) == (1, 2, None)


def test_versions_are_dated_by_the_clock_of_the_book() -> None:
    """A worker that is two minutes late refused a new model as unpriced."""
    book = PriceBook([version(1, 0)], book_ahead=timedelta(minutes=2))

    assert [at(book, minutes) for minutes in (-3, -2, 0)] == [None, 1, 1]


MICROS = st.integers(-5_000_000, 5_000_000)


@given(
    st.lists(st.tuples(MICROS, st.booleans()), max_size=5),
    st.lists(MICROS, min_size=1, max_size=20),
    MICROS,
)
def test_now_says_what_at_says_whatever_was_asked_before(
    begins: list[tuple[int, bool]], asked: list[int], ahead: int
) -> None:
    """Also when the clock is set back, and in the microsecond in which a version begins."""

    def moment(micros: int) -> datetime:
        return NOON + timedelta(microseconds=micros)

    book = PriceBook(
        [
            msgspec.structs.replace(
                version(number, 0, source="operator" if is_operators else "config"),
                effective_from=moment(micros),
            )
            for number, (micros, is_operators) in enumerate(begins)
        ],
        book_ahead=timedelta(microseconds=ahead),
    )
    edges = [micros - ahead + off for micros, _ in begins for off in (-1, 0, 1)]
    noon_us = int(NOON.timestamp()) * 10**6
    for micros in (*asked, *edges, *reversed(asked)):
        for nanos in (0, 999):
            now_ns = (noon_us + micros) * 1000 + nanos
            assert book.now("m", now_ns) is book.at("m", moment(micros))


@given(USAGES, RATES)
def test_the_sum_is_that_of_the_lines(usage: Usage, rates: Rates) -> None:
    plain = Usage(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens)

    for one in (usage, plain):
        assert rates.sum_of(one) == sum(tokens * rate for tokens, rate in rates.lines(one))


@given(USAGES, RATES)
def test_every_token_is_in_exactly_one_line(usage: Usage, rates: Rates) -> None:
    lines = rates.lines(usage)

    assert min(tokens for tokens, _ in lines) >= 0
    assert sum(tokens for tokens, _ in lines) == usage.input_tokens + usage.output_tokens
    assert all(rate <= max(rates.input_rate_max, rates.output_rate_max) for _, rate in lines)


def test_each_kind_has_its_own_rate() -> None:
    rates = Rates(
        input_rate=1,
        output_rate=10,
        cached_input_rate=100,
        cache_write_rate=1000,
        reasoning_rate=10_000,
        audio_input_rate=100_000,
        audio_output_rate=1_000_000,
    )
    usage = Usage(
        input_tokens=1 + 2 + 3 + 4,
        cached_tokens=2,
        cache_write_tokens=3,
        audio_input_tokens=4,
        output_tokens=5 + 6 + 7,
        reasoning_tokens=6,
        audio_output_tokens=7,
    )

    total = sum(tokens * rate for tokens, rate in rates.lines(usage))

    assert total == 1 + 200 + 3000 + 400_000 + 50 + 60_000 + 7_000_000


@given(USAGES, RATES, REPORTED, MARKUPS, st.integers(0, 2**53 - 1))
def test_a_charge_is_the_price_capped_by_the_hold(
    usage: Usage, rates: Rates, reported: Decimal | None, markup_bps: int, hold: int
) -> None:
    charge = charge_for(usage, rates, reported, markup_bps, hold)

    if reported is not None:
        exact = Fraction(reported) * 10**9
    else:
        exact = Fraction(sum(tokens * rate for tokens, rate in rates.lines(usage)), 10**6)
    assert charge.cost_nanos == ceil(exact)
    price = ceil(exact * markup_bps / 10_000)
    assert charge.price_nanos == min(price, hold)
    assert charge.price_nanos + charge.overrun_nanos == price
    assert charge.overrun_nanos >= 0
    assert charge.overrun_nanos == 0 or charge.price_nanos == hold
    assert charge.price_nanos >= charge.cost_nanos or charge.overrun_nanos > 0
    assert (charge.cost_source is CostSource.PROVIDER) == (charge.reported_usd is not None)


@pytest.mark.parametrize("hold", [0, 1000])
def test_a_model_without_price_and_reported_cost_is_free(hold: int) -> None:
    assert charge_for(Usage(input_tokens=5), None, None, 20_000, hold) == NOTHING


def test_a_reported_zero_is_a_price() -> None:
    rates = version(1, 0, rate=10**9).rates

    charge = charge_for(Usage(input_tokens=5), rates, Decimal(0), 20_000, 10**6)

    assert (charge.price_nanos, charge.cost_source) == (0, CostSource.PROVIDER)


def test_a_reported_cost_of_an_unpriced_model_is_the_operators() -> None:
    charge = charge_for(Usage(), None, Decimal("0.001"), 20_000, 0)

    assert (charge.cost_nanos, charge.price_nanos, charge.overrun_nanos) == (10**6, 0, 2 * 10**6)
