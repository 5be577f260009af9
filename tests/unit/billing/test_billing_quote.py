"""The hold is an upper bound of the price."""

from hypothesis import given
from hypothesis import strategies as st

from billing.money import NANOS_MAX, RATE_MAX
from billing.prices import Rates, charge_for
from billing.quote import (
    FORMAT_TOKENS,
    counted_ceiling,
    hold_for,
    input_ceiling,
    output_covered,
)
from billing.usage import Usage

RATE = st.integers(0, 10**10)
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
CEILING = st.integers(FORMAT_TOKENS, (8 << 20) + 500_000)
MOST_OUT = st.integers(0, 8 * 10**6)
SHARE = st.integers(0, 100)


@given(CEILING, MOST_OUT, RATES, st.integers(10_000, 100_000), st.lists(SHARE, min_size=7))
def test_no_usage_within_the_bounds_costs_more_than_the_hold(
    ceiling: int, most_out: int, rates: Rates, markup_bps: int, shares: list[int]
) -> None:
    usage = Usage(
        input_tokens=ceiling * shares[0] // 100,
        output_tokens=most_out * shares[1] // 100,
        cached_tokens=ceiling * shares[2] // 100,
        cache_write_tokens=ceiling * shares[3] // 100,
        audio_input_tokens=ceiling * shares[4] // 100,
        reasoning_tokens=most_out * shares[5] // 100,
        audio_output_tokens=most_out * shares[6] // 100,
    ).within_totals()

    hold = hold_for(ceiling, most_out, rates, markup_bps)

    charge = charge_for(usage, rates, None, markup_bps, hold)
    assert 0 <= hold <= NANOS_MAX
    assert charge.overrun_nanos == 0 or hold == NANOS_MAX


def test_the_ceiling_counts_bytes_images_and_the_format() -> None:
    assert input_ceiling(100, 3, 1000) == 100 + 3000 + FORMAT_TOKENS


def test_a_hold_never_leaves_what_the_till_can_count() -> None:
    rates = Rates(
        input_rate=RATE_MAX,
        output_rate=RATE_MAX,
        cached_input_rate=0,
        cache_write_rate=0,
        reasoning_rate=0,
    )

    assert hold_for(8 << 20, 10**7 * 128, rates, 1_000_000) == NANOS_MAX


@given(st.integers(0, NANOS_MAX - 1), CEILING, RATES, st.integers(10_000, 100_000))
def test_the_output_that_a_hold_covers_is_the_most_that_it_pays(
    hold: int, ceiling: int, rates: Rates, markup_bps: int
) -> None:
    covered = output_covered(hold, ceiling, rates, markup_bps)

    if not rates.output_rate_max:
        assert covered == NANOS_MAX
    elif covered >= 0:
        assert hold_for(ceiling, covered, rates, markup_bps) <= hold
        assert hold_for(ceiling, covered + 1, rates, markup_bps) > hold
    else:
        assert hold_for(ceiling, 0, rates, markup_bps) > hold


def test_a_count_of_the_body_has_a_margin_for_other_tokenizers() -> None:
    assert counted_ceiling(1001) == 1502 + FORMAT_TOKENS
