"""Which operator a credential is. Asked of the book each time: an operator that was revoked is out.

Few ask at once: anybody can make up operator keys with the right checksum, and receipts wait for
the same connections.
Failure: KeysUnavailable when the book does not answer in time, or too many ask.
"""

import asyncio
from uuid import UUID

from config.settings import Keys
from keys.api_key import digest, is_well_formed
from keys.errors import KeysUnavailable
from keys.store import Pool, find_operator

LOOKUPS_AT_ONCE = 2
LOOKUP_WAIT_S = 5.0


class Operators:
    """Looks up operator keys. One for each worker."""

    def __init__(self, keys: Keys, pool: Pool) -> None:
        self.peppers = [
            pepper.reveal().encode() for pepper in (keys.pepper, keys.pepper_previous) if pepper
        ]
        """The pepper in use, then the one before it while keys still have that."""
        self._pool = pool
        self._slots = asyncio.Semaphore(LOOKUPS_AT_ONCE)

    async def find(self, key: bytes) -> UUID | None:
        """The valid operator key that this is; None for anything else."""
        if not (key.startswith(b"fb_op_") and is_well_formed(key)):
            return None
        digests = [digest(key, pepper) for pepper in self.peppers]
        try:
            async with asyncio.timeout(LOOKUP_WAIT_S), self._slots:
                return await find_operator(self._pool, digests)
        except TimeoutError as exc:
            raise KeysUnavailable from exc
