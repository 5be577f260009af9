"""Nanos: the one unit of money, and the only places where money is rounded or printed.

1 nano = 1e-9 USD, a plain int. 1 credit = $0.001 = 1,000,000 nanos. Rates are nanos per million
tokens. Everything rounds once, up, on the sum.
"""

import re
from collections.abc import Iterable
from decimal import Decimal

NANOS_PER_USD = 10**9
NANOS_PER_CREDIT = 10**6
TOKENS_PER_RATE = 10**6
BPS = 10**4
PRICE_PARTS = TOKENS_PER_RATE * BPS
# Lua computes in doubles, exact up to here: $9,007,199.254740991.
NANOS_MAX = 2**53 - 1
# $100,000 per million tokens: with the largest count and markup, amounts still fit a bigint.
RATE_MAX = 10**14
# A decimal number as JSON writes it. More digits than these are noise or an attack, not money, and
# Python's Decimal would also take 1_000, other scripts' digits, NaN and a billion zeros.
DECIMAL = re.compile(r"-?(?:[0-9]{1,40}(?:\.[0-9]{1,40})?|\.[0-9]{1,40})(?:[eE][+-]?[0-9]{1,3})?")
REPORTED_DECIMALS_MAX = 40

Lines = Iterable[tuple[int, int]]


def ceil_div(numerator: int, denominator: int) -> int:
    """Smallest integer that is not below numerator over denominator (denominator > 0)."""
    return -(-numerator // denominator)


def cost_of(lines: Lines) -> int:
    """Provider cost in nanos of (tokens, rate) lines: rounded once, up, on the sum."""
    return cost_of_sum(sum(tokens * rate for tokens, rate in lines))


def price_of(lines: Lines, markup_bps: int) -> int:
    """Price in nanos of (tokens, rate) lines with the markup: rounded once, up, on the sum."""
    return price_of_sum(sum(tokens * rate for tokens, rate in lines), markup_bps)


def cost_of_sum(total: int) -> int:
    """Provider cost in nanos of a sum of tokens times rates, rounded up."""
    return -(-total // TOKENS_PER_RATE)


def price_of_sum(total: int, markup_bps: int) -> int:
    """Price in nanos of a sum of tokens times rates with the markup: exact, then rounded up."""
    return -(-total * markup_bps // PRICE_PARTS)


def read_reported_usd(text: str) -> Decimal | None:
    """A cost in USD as a provider wrote it, exactly; None when it is no sane amount of money."""
    amount = _decimal(text)
    if amount is None or amount < 0 or amount > NANOS_MAX // NANOS_PER_USD:
        return None
    if not amount:  # some encoders write -0 or 0E-99
        return Decimal(0)
    exponent = amount.as_tuple().exponent
    if not isinstance(exponent, int) or exponent < -REPORTED_DECIMALS_MAX:
        return None
    return amount


def cost_of_reported(usd: Decimal) -> int:
    """Provider cost in nanos of a reported cost, rounded up."""
    return price_of_reported(usd, BPS)


def price_of_reported(usd: Decimal, markup_bps: int) -> int:
    """Price in nanos of a reported cost with the markup: exact, then rounded once, up."""
    numerator, denominator = usd.as_integer_ratio()
    return ceil_div(numerator * NANOS_PER_USD * markup_bps, denominator * BPS)


def rate_of_usd(usd_per_mtok: str) -> int:
    """Rate in nanos per million tokens from decimal USD per million tokens, exactly.

    Raises ValueError for anything that is not a whole, non-negative number of nanos.
    """
    nanos = _whole_nanos(usd_per_mtok, NANOS_PER_USD)
    if nanos is None or nanos < 0:
        raise ValueError(f"{usd_per_mtok!r} is no whole number of nanos per million tokens")
    if nanos > RATE_MAX:
        raise ValueError(f"{usd_per_mtok!r} is above {usd_text(RATE_MAX)} USD per million tokens")
    return nanos


def credits_text(nanos: int) -> str:
    """Credits as an exact decimal string without trailing zeros: 1500000 -> '1.5'."""
    return _decimal_text(nanos, NANOS_PER_CREDIT, 6)


def usd_text(nanos: int) -> str:
    """USD as an exact decimal string without trailing zeros: 1500000 -> '0.0015'."""
    return _decimal_text(nanos, NANOS_PER_USD, 9)


def read_credits(text: str) -> int:
    """Nanos of a decimal number of credits, exactly. Raises ValueError."""
    nanos = _whole_nanos(text, NANOS_PER_CREDIT)
    if nanos is None:
        raise ValueError(f"{text!r} credits is no whole number of nanos (6 decimals at most)")
    if abs(nanos) > NANOS_MAX:
        raise ValueError(f"{text!r} credits is more than an account can hold")
    return nanos


def _decimal(text: str) -> Decimal | None:
    return Decimal(text) if DECIMAL.fullmatch(text) else None


def _whole_nanos(text: str, unit: int) -> int | None:
    """text times unit; None unless it is whole. Decimal's own product rounds to 28 digits."""
    amount = _decimal(text)
    if amount is None:
        return None
    numerator, denominator = amount.as_integer_ratio()
    whole, rest = divmod(numerator * unit, denominator)
    return None if rest else whole


def _decimal_text(nanos: int, unit: int, digits: int) -> str:
    whole, rest = divmod(abs(nanos), unit)
    sign = "-" if nanos < 0 else ""
    if not rest:
        return f"{sign}{whole}"
    return f"{sign}{whole}.{str(rest).zfill(digits).rstrip('0')}"
