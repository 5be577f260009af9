"""API keys: `fb_live_` or `fb_test_`, 32 base62 characters, 6 base62 characters of checksum. Pure.

Format and checksum are checked before anything is looked up: bearer strings have carried SQL into
other gateways. Stored is an HMAC with a pepper, never the key: 190 random bits need no slow hash,
and a slow hash would be a lever against us.
"""

import hmac
import re
import secrets
import string
from typing import Literal
from zlib import crc32

import msgspec

Kind = Literal["live", "test", "op"]

BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
SECRET_CHARS = 32
CHECKSUM_CHARS = 6
KEY_FORMAT = re.compile(rb"fb_(?:live|test|op)_[0-9A-Za-z]{38}", re.ASCII)
KEY_LENGTH_MAX = 46


class NewKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key as it is shown once, and what may be kept of it."""

    secret: str
    prefix: str
    last4: str

    def __repr__(self) -> str:
        return f"NewKey({self.prefix}...{self.last4})"


def generate(kind: Kind) -> NewKey:
    """A new key of 190 random bits."""
    return _key(kind, "".join(secrets.choice(BASE62) for _ in range(SECRET_CHARS)))


def derive(kind: Kind, seed: bytes) -> NewKey:
    """The key that always belongs to these 32 unguessable bytes.

    256 bits are many more than the 190.5 of the characters: no character is likelier than another.
    """
    assert len(seed) == 32
    value, characters = int.from_bytes(seed), []
    for _ in range(SECRET_CHARS):
        value, digit = divmod(value, 62)
        characters.append(BASE62[digit])
    return _key(kind, "".join(characters))


def _key(kind: Kind, body: str) -> NewKey:
    start = f"fb_{kind}_{body}"
    secret = start + checksum(start.encode())
    return NewKey(secret=secret, prefix=f"fb_{kind}_{body[:4]}", last4=secret[-4:])


def checksum(start: bytes) -> str:
    """CRC32 of everything before it, in 6 base62 digits, high digit first."""
    value = crc32(start)
    digits = []
    for _ in range(CHECKSUM_CHARS):
        value, digit = divmod(value, 62)
        digits.append(BASE62[digit])
    return "".join(reversed(digits))


def is_well_formed(key: bytes) -> bool:
    """True when format and checksum are right. Costs no I/O and no allocation worth naming."""
    if len(key) > KEY_LENGTH_MAX or not KEY_FORMAT.fullmatch(key):
        return False
    return checksum(key[:-CHECKSUM_CHARS]).encode() == key[-CHECKSUM_CHARS:]


def digest(key: bytes, pepper: bytes) -> bytes:
    """HMAC-SHA256(pepper, key): what is stored and looked up."""
    return hmac.digest(pepper, key, "sha256")
