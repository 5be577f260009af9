"""What the work process knows of the whole system, published in the till for whoever shows it.

One process works and all workers show metrics, so the figures lie in one hash besides the shards.
It goes away with the till's content, or by itself when nobody publishes any more.
Failure: TillUnavailable or TillRefused; nothing but metrics depends on it.
"""

import asyncio

import msgspec

from billing.till_link import TillLink

KEY = "fb:work"


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one moment, except the two that count since the process began to work."""

    drift_nanos: int
    held_nanos: int
    liabilities_nanos: int
    """What the accounts have left: the operator owes it to them."""
    holds: int
    oldest_hold_s: int
    outbox: int
    oldest_outbox_s: int
    recovered: int
    """Holds of dead workers that were ended at their last checkpoint."""
    voided: int
    """Those that had never been forwarded."""
    at_ms: int
    """When, by the till's clock."""

    def age_ms(self, now_ms: int) -> int:
        return max(now_ms - self.at_ms, 0)


async def till_now_ms(link: TillLink) -> int:
    """The till's clock."""
    second, micros = await link.command(("TIME",))
    return int(second) * 1000 + int(micros) // 1000


async def publish(link: TillLink, figures: Figures, lasts_ms: int) -> None:
    """Let everybody read them for so long."""
    fields = msgspec.structs.asdict(figures)
    words = [str(part) for pair in fields.items() for part in pair]
    expiry = ("PEXPIRE", KEY, lasts_ms)
    await asyncio.gather(link.command(("HSET", KEY, *words)), link.command(expiry))


async def read(link: TillLink) -> tuple[Figures, int] | None:
    """What was published last and how old it is in ms; None when there is nothing to read."""
    found, now_ms = await asyncio.gather(link.command(("HGETALL", KEY)), till_now_ms(link))
    names = (name.decode() for name in found[::2])
    try:
        values = map(int, found[1::2])
        figures = msgspec.convert(dict(zip(names, values, strict=True)), Figures)
    except (ValueError, msgspec.ValidationError):
        return None  # nobody published, or another release did
    return figures, figures.age_ms(now_ms)
