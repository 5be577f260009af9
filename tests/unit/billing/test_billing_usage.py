"""Token counts: kinds within their totals, and which counts are believed."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from billing.usage import TOKENS_MAX, Usage, is_believable

COUNTS = st.integers(-10, 1000)
USAGES = st.builds(Usage, **dict.fromkeys(Usage.__struct_fields__, COUNTS))
SANE = st.builds(Usage, **dict.fromkeys(Usage.__struct_fields__, st.integers(0, 1000)))


@given(SANE)
def test_kinds_never_add_up_to_more_than_their_totals(usage: Usage) -> None:
    cut = usage.within_totals()

    assert (cut.input_tokens, cut.output_tokens) == (usage.input_tokens, usage.output_tokens)
    assert cut.cached_tokens + cut.cache_write_tokens + cut.audio_input_tokens <= cut.input_tokens
    assert cut.reasoning_tokens + cut.audio_output_tokens <= cut.output_tokens
    for name in Usage.__struct_fields__:
        assert 0 <= getattr(cut, name) <= getattr(usage, name)


@given(SANE)
def test_what_fits_is_left_alone(usage: Usage) -> None:
    fits = msgspec.structs.replace(usage, input_tokens=3000, output_tokens=2000)

    assert fits.within_totals() == fits
    assert usage.within_totals().within_totals() == usage.within_totals()


@given(USAGES)
def test_no_kind_is_ever_negative(usage: Usage) -> None:
    """A negative kind would make its total's plain part larger than the total."""
    cut = usage.within_totals()

    assert min(msgspec.structs.astuple(cut)[2:]) >= 0


def test_the_believable_and_the_absurd() -> None:
    def believed(*, ceiling: int = 1000, seen: int = 1000, most: int = 100, **counts: int) -> bool:
        return is_believable(Usage(**counts), ceiling, seen, most)

    assert believed()
    assert believed(input_tokens=1000, output_tokens=100)
    assert believed(input_tokens=8 * 1000 + 50_000, output_tokens=9000)
    assert not believed(input_tokens=8 * 1000 + 50_001)
    assert not believed(output_tokens=9001)
    assert believed(output_tokens=21_000, most=10_000)
    assert not believed(output_tokens=21_001, most=10_000)
    assert not believed(input_tokens=-1)
    assert not believed(output_tokens=-1)
    assert not believed(input_tokens=TOKENS_MAX + 1, ceiling=TOKENS_MAX)
    assert not believed(output_tokens=TOKENS_MAX + 1, most=TOKENS_MAX)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_what_the_request_allows_is_always_believed(ceiling: int, seen: int, most: int) -> None:
    assert is_believable(Usage(input_tokens=ceiling, output_tokens=most), ceiling, seen, most)
