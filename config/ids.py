"""Ids: UUIDv7, shown as a prefix and 26 characters of base32hex (RFC 4648 section 7, lower case).

base32hex keeps the order of the bytes, so ids sort by time like the UUIDs behind them.
"""

import os
import time
from uuid import UUID

ALPHABET = "0123456789abcdefghijklmnopqrstuv"
# 130 bits in 13 groups of 10; the two bits beyond a UUID's 128 are zero, at the end.
_PAIRS = [a + b for a in ALPHABET for b in ALPHABET]
_SHIFTS = tuple(range(120, -1, -10))
_TEXT_LENGTH = 26
# By table, not by str.lower(): that turns the Kelvin sign into a k.
_DIGITS = {char: at for at, low in enumerate(ALPHABET) for char in (low, low.upper())}


def new_id() -> UUID:
    """A UUIDv7 (RFC 9562 section 5.7): 48 bits of unix milliseconds, then 74 random bits."""
    millis = time.time_ns() // 1_000_000
    rand = int.from_bytes(os.urandom(10))
    high = (millis << 16) | 0x7000 | (rand >> 68)
    low = (rand & 0x3FFF_FFFF_FFFF_FFFF) | (0b10 << 62)
    return UUID(int=(high << 64) | low)


def id_text(uid: UUID) -> str:
    """26 characters of base32hex."""
    bits = uid.int << 2
    return "".join([_PAIRS[(bits >> shift) & 1023] for shift in _SHIFTS])


def read_id(text: str) -> UUID:
    """The UUID of an id with or without prefix ('rcpt_...'). Raises ValueError."""
    body = text.rpartition("_")[2]
    digits = [_DIGITS.get(char, -1) for char in body[: _TEXT_LENGTH + 1]]
    bits = 0
    for digit in digits:
        bits = (bits << 5) | digit
    if len(digits) != _TEXT_LENGTH or min(digits) < 0 or bits & 0b11:
        raise ValueError(f"{text[:64]!r} is no id of ours")
    return UUID(int=bits >> 2)
