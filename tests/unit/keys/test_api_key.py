"""The format of API keys: refused by format and checksum alone, before anything is looked up."""

import hashlib
import hmac
import random
from typing import Any
from zlib import crc32

import pytest

from config.secret import Secret
from config.settings import Keys, Settings
from gateway.relay.authenticate import Authenticator, credential_of
from gateway.supervise import Tasks
from keys.api_key import BASE62, Kind, checksum, derive, digest, generate, is_well_formed
from keys.errors import CredentialMissing, KeysError


@pytest.mark.parametrize("kind", ["live", "test", "op"])
def test_a_new_key_is_well_formed(kind: Kind) -> None:
    new = generate(kind)

    assert new.secret.startswith(f"fb_{kind}_")
    assert len(new.secret) == len(f"fb_{kind}_") + 38
    assert new.secret.startswith(new.prefix)
    assert new.secret.endswith(new.last4)
    assert is_well_formed(new.secret.encode())
    assert new.secret not in repr(new)
    assert generate(kind).secret != new.secret


def test_the_checksum_is_crc32_in_base62() -> None:
    for start in (b"", b"fb_live_", b"fb_test_" + b"z" * 32):
        digits = checksum(start)
        value = 0
        for char in digits:
            value = value * 62 + BASE62.index(char)
        assert len(digits) == 6
        assert value == crc32(start)


def test_one_changed_character_is_found() -> None:
    secret = generate("live").secret
    for at in range(len(secret)):
        for other in "0aZ_":
            if other != secret[at]:
                changed = secret[:at] + other + secret[at + 1 :]
                assert not is_well_formed(changed.encode())


def test_the_digest_is_an_hmac_with_the_pepper() -> None:
    key, pepper = generate("live").secret.encode(), b"pepper" * 6

    assert digest(key, pepper) == hmac.new(pepper, key, hashlib.sha256).digest()
    assert digest(key, pepper) != digest(key, b"other" * 6)


def malformed(random: random.Random) -> bytes:
    """Near misses and noise."""
    good = generate(random.choice(["live", "test", "op"])).secret.encode()
    at = random.randrange(len(good))
    noise = random.randbytes(random.randrange(80))
    return random.choice(
        [
            noise,
            good[:at],
            good + good[at:] + b"0",
            good[:at] + bytes([good[at] ^ (1 << random.randrange(8))]) + good[at + 1 :],
            good[:at] + b"' OR 1=1 --" + good[at:],
            good[: len(good) - 6] + random.randbytes(6),
            good + b"\n",
            b"\x00" + good,
            good.upper(),
            good.replace(b"fb_", b"sk-", 1),
            good * 1000,
        ]
    )


class NoPool:
    """A pool that must not be touched."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"pool.{name} was used")


async def test_malformed_keys_are_refused_without_io() -> None:
    settings = Settings(keys=Keys(pepper=Secret("p" * 32)))
    tasks = Tasks()
    authenticator = Authenticator(settings, NoPool(), tasks)  # type: ignore[arg-type]
    seeded = random.Random(7)
    refused = 0
    for _ in range(10_000):
        key = malformed(seeded)
        headers = {b"authorization": b"Bearer " + key}
        # The header's own white space is no part of a key.
        if is_well_formed(key.strip()):
            continue
        assert not is_well_formed(key)
        with pytest.raises(KeysError):
            await authenticator.authenticate(headers)
        refused += 1

    assert refused > 8000
    assert len(tasks) == 0


async def test_an_operators_key_cannot_infer() -> None:
    settings = Settings(keys=Keys(pepper=Secret("p" * 32)))
    authenticator = Authenticator(settings, NoPool(), Tasks())  # type: ignore[arg-type]
    headers = {b"x-api-key": generate("op").secret.encode()}

    with pytest.raises(KeysError):
        await authenticator.authenticate(headers)


def test_the_credential_is_found_in_three_headers() -> None:
    assert credential_of({b"authorization": b"Bearer k"}) == b"k"
    assert credential_of({b"authorization": b"  bearer   k  "}) == b"k"
    assert credential_of({b"x-api-key": b" k "}) == b"k"
    assert credential_of({b"api-key": b"k"}) == b"k"
    assert credential_of({b"authorization": b"Bearer a", b"x-api-key": b"b"}) == b"a"
    assert credential_of({b"authorization": b"Bearer"}) == b""
    for headers in ({}, {b"x-api-key": b""}, {b"cookie": b"k"}):
        with pytest.raises(CredentialMissing):
            credential_of(headers)
    with pytest.raises(KeysError):
        credential_of({b"authorization": b"Basic abc"})


def test_a_derived_key_belongs_to_its_seed_alone() -> None:
    seeds = [hashlib.sha256(b"%d" % number).digest() for number in range(200)]
    keys = [derive("live", seed) for seed in seeds]

    assert all(is_well_formed(key.secret.encode()) for key in keys)
    assert [derive("live", seed).secret for seed in seeds] == [key.secret for key in keys]
    assert len({key.secret for key in keys}) == len(keys)
    assert derive("test", seeds[0]).secret[8:40] == keys[0].secret[8:40]
    # Every character occurs: none of the 62 is out of reach of a seed.
    assert set("".join(key.secret[8:40] for key in keys)) == set(BASE62)
