"""Other people's secrets, sealed: AES-256-GCM, bound to the virtual key and provider they are for.

A row that is copied to another key or provider does not open there. Two keys open while one is
changed for the other; only the newer one seals.
Failure: SealBroken, which says nothing of what was inside.
"""

import hmac
import os
import re
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from config.secret import Secret
from config.settings import Keys
from config.strength import key_bytes
from keys.errors import SealBroken, SealingKeyMissing

NONCE_BYTES = 12
# What a sealed text begins with: another way to seal would begin with another byte.
VERSION = b"\x01"
# The key in the settings may be longer than AES takes, and may have other uses one day.
PURPOSE = b"farebox upstream credentials 1"
# What may follow `Bearer ` in a header, and no more.
SENDABLE = re.compile(r"[\x21-\x7e]{8,512}")


class Sealer:
    """Seals with the first of its keys and opens with any."""

    def __init__(self, keys: list[bytes]) -> None:
        self._ciphers = [AESGCM(hmac.digest(key, PURPOSE, "sha256")) for key in keys]

    def seal(self, secret: Secret, virtual_key_id: UUID, provider: str) -> bytes:
        """The same secret is sealed differently each time. Raises SealingKeyMissing."""
        if not self._ciphers:
            raise SealingKeyMissing
        nonce = os.urandom(NONCE_BYTES)
        text = secret.reveal().encode()
        sealed = self._ciphers[0].encrypt(nonce, text, _bound_to(virtual_key_id, provider))
        return VERSION + nonce + sealed

    def open(self, sealed: bytes, virtual_key_id: UUID, provider: str) -> Secret:
        """Raises SealBroken: changed, of another key or provider, or under a key that is gone."""
        nonce, text = sealed[1 : 1 + NONCE_BYTES], sealed[1 + NONCE_BYTES :]
        bound_to = _bound_to(virtual_key_id, provider)
        if sealed[:1] == VERSION and len(nonce) == NONCE_BYTES:
            for cipher in self._ciphers:
                try:
                    opened = cipher.decrypt(nonce, text, bound_to).decode("ascii", "replace")
                except InvalidTag:
                    continue
                if SENDABLE.fullmatch(opened):
                    return Secret(opened)
        raise SealBroken


def sealer_of(keys: Keys) -> Sealer:
    """The sealer of these settings; without a key it opens nothing. Raises ValueError."""
    secrets = (keys.encryption_key, keys.encryption_key_previous)
    return Sealer([key_bytes(secret) for secret in secrets if secret])


def _bound_to(virtual_key_id: UUID, provider: str) -> bytes:
    return virtual_key_id.bytes + provider.encode()
