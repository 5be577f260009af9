"""Whether a secret can be guessed, or is one that was never meant to be used (pure).

A reason never contains any of the secret.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping

from config.secret import Secret

PEPPER_CHARACTERS_MIN = 32
TOKEN_CHARACTERS_MIN = 16
# A random pepper of hex digits has 13 or 14 different ones.
DIFFERENT_MIN = 8
OBVIOUS = re.compile(
    r"change|replace|default|example|secret|password|pepper|token|farebox|insecure|please|this|your"
    r"|me"
)
OBVIOUS_REST_MIN = 16
TOKEN_REST_MIN = 8
KEY_BYTES_MIN = 32
# Of 32 random bytes some thirty are different.
KEY_BYTES_DIFFERENT_MIN = 16
HEX = re.compile(r"[0-9a-fA-F]+")


def weakness(secret: Secret) -> str | None:
    """Say why a pepper is weak. Its only enemy is guessing, so length and variety are enough."""
    return _guessable(secret.reveal(), PEPPER_CHARACTERS_MIN, OBVIOUS_REST_MIN)


def token_weakness(secret: Secret) -> str | None:
    """Say why a bearer token is weak."""
    return _guessable(secret.reveal(), TOKEN_CHARACTERS_MIN, TOKEN_REST_MIN)


def _guessable(text: str, characters_min: int, rest_min: int) -> str | None:
    if len(text) < characters_min:
        return f"shorter than {characters_min} characters"
    # A text found inside its own doubling before its end is one piece repeated.
    if (text + text).find(text, 1) < len(text):
        return "one piece repeated"
    if len(set(text)) < DIFFERENT_MIN:
        return "made of too few different characters"
    rest = OBVIOUS.sub("", re.sub(r"[-_ .]", "", text.lower()))
    return "made of obvious words" if len(rest) < rest_min else None


def key_bytes(secret: Secret) -> bytes:
    """The bytes of an encryption key written as hex or base64. Raises ValueError."""
    text = secret.reveal().strip()
    try:
        # Hex digits are also base64, of more and other bytes: hex is what was meant.
        if HEX.fullmatch(text):
            key = bytes.fromhex(text)
        else:
            plain = text.replace("-", "+").replace("_", "/").rstrip("=")
            key = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) < KEY_BYTES_MIN:
        raise ValueError(f"expected at least {KEY_BYTES_MIN} bytes as hex or base64")
    return key


def key_weakness(secret: Secret) -> str | None:
    """Say why an encryption key is none."""
    try:
        key = key_bytes(secret)
    except ValueError as exc:
        return str(exc)
    return "not random" if len(set(key)) < KEY_BYTES_DIFFERENT_MIN else None


def repeated(secrets: Mapping[str, Secret]) -> Iterator[tuple[str, str]]:
    """(name, the name of an earlier one with the same value): who learns one has both."""
    known: list[tuple[str, Secret]] = []
    for name, secret in secrets.items():
        if not secret:
            continue
        twin = next((other for other, value in known if value == secret), None)
        if twin is not None:
            yield name, twin
        known.append((name, secret))
