"""Sealed secrets open for their own virtual key and provider only, and only unchanged."""

import base64
import os

import pytest

from config.ids import new_id
from config.secret import Secret
from config.settings import Keys
from config.strength import key_bytes
from keys.errors import SealBroken, SealingKeyMissing
from keys.sealed import Sealer, sealer_of

OLD, NEW = os.urandom(32), os.urandom(32)
OWN = Secret("own-key-of-a-customer")
OWNER = new_id()


def sealer(*keys: bytes) -> Sealer:
    return Sealer(list(keys))


def test_a_secret_comes_back_and_is_never_sealed_twice_the_same_way() -> None:
    one, two = (sealer(OLD).seal(OWN, OWNER, "litellm") for _ in range(2))

    assert one != two
    assert b"own-key" not in one
    assert sealer(OLD).open(one, OWNER, "litellm") == OWN
    assert sealer(OLD).open(two, OWNER, "litellm") == OWN
    assert 28 <= len(one) <= 8192


def test_the_row_of_another_key_or_provider_does_not_open() -> None:
    sealed = sealer(OLD).seal(OWN, OWNER, "litellm")
    for owner, provider in [(new_id(), "litellm"), (OWNER, "openai"), (OWNER, "litellm ")]:
        with pytest.raises(SealBroken):
            sealer(OLD).open(sealed, owner, provider)


def test_nothing_that_was_changed_opens() -> None:
    sealed = sealer(OLD).seal(OWN, OWNER, "litellm")
    changed = [
        sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :] for at in range(len(sealed))
    ]
    for broken in [*changed, b"", sealed[:5], sealed[:13], sealed[:-1], sealed + b"\0"]:
        with pytest.raises(SealBroken):
            sealer(OLD).open(broken, OWNER, "litellm")


def test_while_the_key_is_changed_both_open_and_the_newer_one_seals() -> None:
    old = sealer(OLD).seal(OWN, OWNER, "litellm")
    both = sealer(NEW, OLD)
    new = both.seal(both.open(old, OWNER, "litellm"), OWNER, "litellm")

    assert sealer(NEW).open(new, OWNER, "litellm") == OWN
    with pytest.raises(SealBroken):
        sealer(NEW).open(old, OWNER, "litellm")
    with pytest.raises(SealBroken):
        sealer(OLD).open(new, OWNER, "litellm")


@pytest.mark.parametrize(
    "text", ["short", "with a space", "line\r\nbreak: x", "caf\u00e9-caf\u00e9", "x" * 513]
)
def test_what_cannot_be_sent_does_not_open(text: str) -> None:
    """Nothing of ours seals it; whoever can would write lines into our requests."""
    sealed = sealer(OLD).seal(Secret(text), OWNER, "litellm")
    with pytest.raises(SealBroken):
        sealer(OLD).open(sealed, OWNER, "litellm")


def test_without_a_key_nothing_is_sealed_and_nothing_opens() -> None:
    nothing = sealer_of(Keys())
    with pytest.raises(SealingKeyMissing):
        nothing.seal(OWN, OWNER, "litellm")
    with pytest.raises(SealBroken):
        nothing.open(sealer(OLD).seal(OWN, OWNER, "litellm"), OWNER, "litellm")


@pytest.mark.parametrize(
    "text", [OLD.hex(), OLD.hex().upper(), base64.b64encode(OLD).decode(), f" {OLD.hex()}\n"]
)
def test_keys_are_hex_or_base64(text: str) -> None:
    assert key_bytes(Secret(text)) == OLD
    assert key_bytes(Secret(base64.urlsafe_b64encode(b"\xff" * 48).decode())) == b"\xff" * 48


@pytest.mark.parametrize("text", ["", "qqq", OLD.hex()[:62], "*" * 64, "a" * 40, "\u00e9" * 64])
def test_other_keys_are_refused_without_being_shown(text: str) -> None:
    with pytest.raises(ValueError, match="at least 32 bytes") as caught:
        key_bytes(Secret(text))
    assert not text or text not in str(caught.value)


def test_settings_with_both_keys_open_what_either_sealed() -> None:
    keys = Keys(encryption_key=Secret(NEW.hex()), encryption_key_previous=Secret(OLD.hex()))
    sealed = sealer(OLD).seal(OWN, OWNER, "litellm")

    assert sealer_of(keys).open(sealed, OWNER, "litellm") == OWN
