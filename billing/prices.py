"""The price book in memory: versioned, effective-dated rates and what a usage costs by them.

Pure. `prices_store.py` keeps the book in Postgres; every receipt names the version it used, so a
price can be recomputed by hand for ever.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from functools import cached_property

import msgspec

from billing.money import cost_of_reported, cost_of_sum, price_of_reported, price_of_sum
from billing.usage import Usage


class CostSource(StrEnum):
    """What a receipt's cost rests on."""

    PROVIDER = "provider"
    """The provider said what the call cost."""
    PRICE_BOOK = "price_book"
    """Token counts times the rates of a price version."""
    NONE = "none"
    """No price and no reported cost, or nothing billable."""


class Rates(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Nanos per million tokens by kind. None: the model does not sell that kind."""

    input_rate: int
    output_rate: int
    cached_input_rate: int
    cache_write_rate: int
    reasoning_rate: int
    audio_input_rate: int | None = None
    audio_output_rate: int | None = None

    def lines(self, usage: Usage) -> list[tuple[int, int]]:
        """(tokens, rate) of every kind; the kinds inside a total are taken out of it."""
        plain_in = (
            usage.input_tokens
            - usage.cached_tokens
            - usage.cache_write_tokens
            - usage.audio_input_tokens
        )
        plain_out = usage.output_tokens - usage.reasoning_tokens - usage.audio_output_tokens
        return [
            (plain_in, self.input_rate),
            (usage.cached_tokens, self.cached_input_rate),
            (usage.cache_write_tokens, self.cache_write_rate),
            (usage.audio_input_tokens, _or(self.audio_input_rate, self.input_rate)),
            (plain_out, self.output_rate),
            (usage.reasoning_tokens, self.reasoning_rate),
            (usage.audio_output_tokens, _or(self.audio_output_rate, self.output_rate)),
        ]

    def sum_of(self, usage: Usage) -> int:
        """Tokens times rate, summed over `lines`."""
        inside = usage.cached_tokens or usage.cache_write_tokens or usage.reasoning_tokens
        if inside or usage.audio_input_tokens or usage.audio_output_tokens:
            return sum([tokens * rate for tokens, rate in self.lines(usage)])
        return usage.input_tokens * self.input_rate + usage.output_tokens * self.output_rate

    @cached_property
    def input_rate_max(self) -> int:
        """The dearest way an input token can be billed."""
        return max(
            self.input_rate,
            self.cached_input_rate,
            self.cache_write_rate,
            self.audio_input_rate or 0,
        )

    @cached_property
    def output_rate_max(self) -> int:
        """The dearest way an output token can be billed."""
        return max(self.output_rate, self.reasoning_rate, self.audio_output_rate or 0)


class PriceVersion(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the price book. Operator rows win over config rows of the same model."""

    price_version: int
    model: str
    source: str
    effective_from: datetime
    rates: Rates


class Charge(msgspec.Struct, frozen=True, kw_only=True):
    """What one call costs us and the account, in nanos, and what that rests on."""

    cost_nanos: int
    price_nanos: int
    overrun_nanos: int
    cost_source: CostSource
    reported_usd: Decimal | None = None


NOTHING = Charge(cost_nanos=0, price_nanos=0, overrun_nanos=0, cost_source=CostSource.NONE)


class _InForce(msgspec.Struct, frozen=True):
    """What `at` says for every moment from since_ns on and before until_ns."""

    version: PriceVersion | None
    since_ns: int
    until_ns: int


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_NEVER_NS = 2**63


class PriceBook:
    """All known price versions, newest first for each model. What it says never changes.

    book_ahead: how far the clock that dated the versions is ahead of the one that asks. Without
    it a worker whose clock is late would find a new model without a price.
    """

    def __init__(
        self, versions: Iterable[PriceVersion], book_ahead: timedelta = timedelta()
    ) -> None:
        by_model: dict[str, list[PriceVersion]] = {}
        for version in versions:
            by_model.setdefault(version.model, []).append(version)
        for rows in by_model.values():
            rows.sort(key=_precedence, reverse=True)
        self._by_model: Mapping[str, list[PriceVersion]] = by_model
        self._book_ahead = book_ahead
        self._in_force: dict[str, _InForce] = {}

    def at(self, model: str, moment: datetime) -> PriceVersion | None:
        """The version in force at that moment (UTC), or None for an unpriced model."""
        at_the_book = moment + self._book_ahead
        for version in self._by_model.get(model, ()):
            if version.effective_from <= at_the_book:
                return version
        return None

    def now(self, model: str, now_ns: int) -> PriceVersion | None:
        """The version in force at that nanosecond since 1970: as `at`, but cheap to ask often.

        Asked for models of the catalog only: their number bounds what is remembered.
        """
        known = self._in_force.get(model)
        if known is None or not known.since_ns <= now_ns < known.until_ns:
            known = self._in_force[model] = self._look(model, now_ns)
        return known.version

    def _look(self, model: str, now_ns: int) -> _InForce:
        moment = _EPOCH + now_ns // 1000 * _MICROSECOND
        next_ns = [
            begins_ns
            for version in self._by_model.get(model, ())
            if (begins_ns := self._begins_ns(version)) > now_ns
        ]
        return _InForce(self.at(model, moment), now_ns, min(next_ns, default=_NEVER_NS))

    def _begins_ns(self, version: PriceVersion) -> int:
        """When a version begins by the clock of the one who asks."""
        return (version.effective_from - _EPOCH - self._book_ahead) // _MICROSECOND * 1000


def charge_for(
    usage: Usage,
    rates: Rates | None,
    reported_usd: Decimal | None,
    markup_bps: int,
    hold_nanos: int,
) -> Charge:
    """Price one call: a reported cost is preferred over the book; the hold caps the price.

    What the provider bills beyond the hold is the operator's (overrun), never the user's.
    """
    if reported_usd is not None:
        cost = cost_of_reported(reported_usd)
        price = price_of_reported(reported_usd, markup_bps)
        source = CostSource.PROVIDER
    elif rates is not None:
        total = rates.sum_of(usage)
        cost = cost_of_sum(total)
        price = price_of_sum(total, markup_bps)
        source = CostSource.PRICE_BOOK
    else:
        return NOTHING
    capped = min(price, hold_nanos)
    return Charge(
        cost_nanos=cost,
        price_nanos=capped,
        overrun_nanos=price - capped,
        cost_source=source,
        reported_usd=reported_usd,
    )


def _or(rate: int | None, instead: int) -> int:
    return instead if rate is None else rate


def _precedence(version: PriceVersion) -> tuple[bool, datetime, int]:
    return (version.source == "operator", version.effective_from, version.price_version)
