"""Amounts: exact, rounded once, up, and printed without losing a digit."""

from decimal import Decimal
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing import money

TOKENS = st.integers(0, 10**8)
RATES = st.integers(0, money.RATE_MAX)
LINES = st.lists(st.tuples(TOKENS, RATES), max_size=7)
MARKUPS = st.integers(10_000, 1_000_000)
NANOS = st.integers(-money.NANOS_MAX, money.NANOS_MAX)
USD = st.decimals(0, 9_007_199, allow_nan=False, allow_infinity=False, places=18)
NO_AMOUNTS = [
    *("", " ", "-", "+1", "1_000", " 1", "1 ", "1\n", "\n1", "0x10", "1e", "e1", "1e+", "--1"),
    *(
        "NaN",
        "sNaN",
        "nan",
        "Infinity",
        "-inf",
        "\u0661\u0662",
        "\uff11",
        "1,5",
        "1.2.3",
        ".",
        "1.",
        "$1",
    ),
    *("1e9999", "9" * 41, "0." + "1" * 41, "1e999999999", "true", "null", "1\x00", "1;DROP"),
]


@given(st.integers(), st.integers(1))
def test_a_division_rounds_up(numerator: int, denominator: int) -> None:
    assert money.ceil_div(numerator, denominator) == ceil(Fraction(numerator, denominator))


@given(LINES)
def test_cost_is_rounded_once_on_the_sum(lines: list[tuple[int, int]]) -> None:
    exact = sum((Fraction(tokens * rate, 10**6) for tokens, rate in lines), Fraction())

    assert money.cost_of(lines) == ceil(exact)


@given(LINES, MARKUPS)
def test_price_is_rounded_once_and_never_below_cost(
    lines: list[tuple[int, int]], markup_bps: int
) -> None:
    exact = sum((Fraction(tokens * rate, 10**6) for tokens, rate in lines), Fraction())

    price = money.price_of(lines, markup_bps)

    assert price == ceil(exact * markup_bps / 10_000)
    assert price >= money.cost_of(lines)


@given(USD, MARKUPS)
def test_a_reported_cost_is_priced_exactly(usd: Decimal, markup_bps: int) -> None:
    exact = Fraction(usd) * 10**9

    assert money.cost_of_reported(usd) == ceil(exact)
    assert money.price_of_reported(usd, markup_bps) == ceil(exact * markup_bps / 10_000)


@given(USD)
def test_a_reported_cost_is_read_to_the_last_digit(usd: Decimal) -> None:
    assert money.read_reported_usd(f"{usd:f}") == usd
    assert money.read_reported_usd(str(usd)) == usd


@given(st.floats(0, 9_007_199, allow_nan=False))
def test_what_json_encoders_write_is_read_as_written(number: float) -> None:
    text = repr(number)
    read = money.read_reported_usd(text)

    assert read == Decimal(text) or (0 < number < 1e-22 and read is None)


@pytest.mark.parametrize("text", ["0", "-0", "0.0", "-0.0", "0e5", "0E-99"])
def test_every_way_to_write_nothing_is_a_value(text: str) -> None:
    read = money.read_reported_usd(text)

    assert read is not None
    assert str(read) == "0"


@pytest.mark.parametrize("text", [*NO_AMOUNTS, "-1", "-1e-9", "9007200", "1e7", "1e-41", "1e-999"])
def test_no_sane_amount_is_no_reported_cost(text: str) -> None:
    assert money.read_reported_usd(text) is None


@given(st.text(max_size=60))
def test_any_text_is_an_amount_or_none(text: str) -> None:
    amount = money.read_reported_usd(text)

    assert amount is None or 0 <= money.cost_of_reported(amount) <= money.NANOS_MAX


@pytest.mark.parametrize("text", NO_AMOUNTS)
def test_no_decimal_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"whole number of nanos|more than an account"):
        money.read_credits(text)
    with pytest.raises(ValueError, match=r"whole number of nanos|is above"):
        money.rate_of_usd(text)


@given(NANOS)
def test_credits_print_and_read_back(nanos: int) -> None:
    text = money.credits_text(nanos)

    assert money.read_credits(text) == nanos
    assert Decimal(text) == Decimal(nanos).scaleb(-6)
    assert "." not in text or text[-1] not in "0."


@given(NANOS)
def test_usd_print_exactly(nanos: int) -> None:
    text = money.usd_text(nanos)

    assert Fraction(text) == Fraction(nanos, 10**9)
    assert "." not in text or text[-1] not in "0."


@given(st.integers(0, money.RATE_MAX))
def test_rates_read_back(rate: int) -> None:
    assert money.rate_of_usd(money.usd_text(rate)) == rate


def test_digits_beyond_a_decimal_context_still_count() -> None:
    """Decimal's product rounds to 28 digits: this was read as exactly one credit."""
    almost_one = "1." + "0" * 35 + "1"

    with pytest.raises(ValueError, match="no whole number"):
        money.read_credits(almost_one)
    with pytest.raises(ValueError, match="no whole number"):
        money.rate_of_usd(almost_one)


def test_amounts_end_where_the_till_counts_exactly() -> None:
    assert money.NANOS_MAX == 2**53 - 1
    assert money.read_credits("9007199254.740991") == money.NANOS_MAX
    with pytest.raises(ValueError, match="more than an account can hold"):
        money.read_credits("9007199254.740992")
    with pytest.raises(ValueError, match="is above 100000 USD"):
        money.rate_of_usd("100000.000000001")
    with pytest.raises(ValueError, match="no whole number"):
        money.rate_of_usd("0.0000000001")
    with pytest.raises(ValueError, match="no whole number"):
        money.rate_of_usd("-1")


def test_the_largest_charge_fits_a_bigint() -> None:
    largest = [(10**8, money.RATE_MAX), (10**8, money.RATE_MAX)]

    assert money.price_of(largest, 1_000_000) < 2**63
    assert money.price_of_reported(Decimal(9_007_199), 1_000_000) < 2**63


def test_the_table_of_known_amounts() -> None:
    assert money.cost_of([(1, 1)]) == 1
    assert money.cost_of([(1000, 150_000_000), (500, 600_000_000)]) == 450_000
    assert money.price_of([(1, 150_000_000)], 20_000) == 300
    # Each line alone would round up to a nano: three nanos instead of one.
    assert money.cost_of([(1, 1), (1, 1), (1, 1)]) == 1
    assert money.credits_text(1_500_000) == "1.5"
    assert money.usd_text(1_500_000) == "0.0015"
    assert money.credits_text(-1) == "-0.000001"
    assert money.cost_of_reported(Decimal("1e-30")) == 1
