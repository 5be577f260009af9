"""The hold is an upper bound of the price."""

from hypothesis import given
from hypothesis import strategies as st

from billing.money import NANOS_MAX, RATE_MAX
from billing.prices import Rates, charge_for
from billing.quote import FORMAT_TOKENS, CallSize, hold_for, input_ceiling
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
SIZES = st.builds(
    CallSize,
    text_bytes=st.integers(0, 8 << 20),
    image_parts=st.integers(0, 100),
    output_tokens=st.integers(0, 10**6),
    choices=st.integers(1, 8),
)
SHARE = st.integers(0, 100)


@given(
    SIZES, st.integers(0, 5000), RATES, st.integers(10_000, 100_000), st.lists(SHARE, min_size=7)
)
def test_no_usage_within_the_bounds_costs_more_than_the_hold(
    size: CallSize, image_tokens: int, rates: Rates, markup_bps: int, shares: list[int]
) -> None:
    ceiling = input_ceiling(size, image_tokens)
    most_out = size.output_tokens * size.choices
    usage = Usage(
        input_tokens=ceiling * shares[0] // 100,
        output_tokens=most_out * shares[1] // 100,
        cached_tokens=ceiling * shares[2] // 100,
        cache_write_tokens=ceiling * shares[3] // 100,
        audio_input_tokens=ceiling * shares[4] // 100,
        reasoning_tokens=most_out * shares[5] // 100,
        audio_output_tokens=most_out * shares[6] // 100,
    ).within_totals()

    hold = hold_for(size, image_tokens, rates, markup_bps)

    charge = charge_for(usage, rates, None, markup_bps, hold)
    assert 0 <= hold <= NANOS_MAX
    assert charge.overrun_nanos == 0 or hold == NANOS_MAX


def test_the_ceiling_counts_bytes_images_and_the_format() -> None:
    size = CallSize(text_bytes=100, image_parts=3, output_tokens=0)

    assert input_ceiling(size, 1000) == 100 + 3000 + FORMAT_TOKENS


def test_a_hold_never_leaves_what_the_till_can_count() -> None:
    rates = Rates(
        input_rate=RATE_MAX,
        output_rate=RATE_MAX,
        cached_input_rate=0,
        cache_write_rate=0,
        reasoning_rate=0,
    )
    size = CallSize(text_bytes=8 << 20, output_tokens=10**7, choices=128)

    assert hold_for(size, 0, rates, 1_000_000) == NANOS_MAX
