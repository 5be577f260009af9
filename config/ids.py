"""Ids: UUIDv7, shown as a prefix and 26 characters of base32hex (RFC 4648 section 7, lower case).

base32hex keeps the order of the bytes, so ids sort by time like the UUIDs behind them.
"""

import os
import time
from uuid import UUID, SafeUUID

ALPHABET = "0123456789abcdefghijklmnopqrstuv"
# 130 bits in 13 groups of 10; the two bits beyond a UUID's 128 are zero, at the end.
_PAIRS = [a + b for a in ALPHABET for b in ALPHABET]
_TEXT_LENGTH = 26
# By table, not by str.lower(): that turns the Kelvin sign into a k.
_DIGITS = {char: at for at, low in enumerate(ALPHABET) for char in (low, low.upper())}
_MASK_30 = (1 << 30) - 1
# The last 80 bits of a UUIDv7: version and variant are fixed, 12 and 62 bits are random.
_FIXED = (7 << 76) | (0b10 << 62)
_RANDOM = (((1 << 12) - 1) << 64) | ((1 << 62) - 1)
_set_int, _set_is_safe = vars(UUID)["int"].__set__, vars(UUID)["is_safe"].__set__
_UNKNOWN = SafeUUID.unknown

# Ends of ids to come, fetched in one go: a call of the kernel for each costs more than the id.
# They are only popped, so that no two threads get the same one, and never taken across a fork.
_RANDOM_BYTES = 4096
_spare: list[int] = []
os.register_at_fork(after_in_child=_spare.clear)


def new_id() -> UUID:
    """A UUIDv7 (RFC 9562 section 5.7): 48 bits of unix milliseconds, then 74 random bits."""
    try:
        end = _spare.pop()
    except IndexError:
        end = _refill()
    uid = UUID.__new__(UUID)
    # As UUID(int=...) does after its checks of all the ways in which a UUID can be made.
    _set_int(uid, (time.time_ns() // 1_000_000) << 80 | end)
    _set_is_safe(uid, _UNKNOWN)
    return uid


def id_text(uid: UUID) -> str:
    """26 characters of base32hex."""
    bits = uid.int << 2
    # Numbers of 30 bits are the fast ones in Python.
    a, b = bits >> 100, (bits >> 70) & _MASK_30
    c, d = (bits >> 40) & _MASK_30, (bits >> 10) & _MASK_30
    pairs = _PAIRS
    return (
        f"{pairs[a >> 20]}{pairs[a >> 10 & 1023]}{pairs[a & 1023]}"
        f"{pairs[b >> 20]}{pairs[b >> 10 & 1023]}{pairs[b & 1023]}"
        f"{pairs[c >> 20]}{pairs[c >> 10 & 1023]}{pairs[c & 1023]}"
        f"{pairs[d >> 20]}{pairs[d >> 10 & 1023]}{pairs[d & 1023]}"
        f"{pairs[bits & 1023]}"
    )


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


def _refill() -> int:
    data = os.urandom(_RANDOM_BYTES)
    numbers = (int.from_bytes(data[at : at + 10]) for at in range(0, _RANDOM_BYTES - 9, 10))
    end, *more = (number & _RANDOM | _FIXED for number in numbers)
    _spare.extend(more)
    return end
