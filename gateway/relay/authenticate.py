"""Stage 1: who is calling. Warm credentials cost no I/O; a revoked key is out within 5 seconds.

Answers of the book are kept for a short time, unknown keys too, and renewed in the background
before they get old. When the book is away, a known key goes on for a while: its status is also
part of `admit`.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime

from billing.errors import AccountFrozen
from billing.till import spend_scopes
from config.ids import id_text
from config.settings import Settings
from gateway.relay.call import Caller
from gateway.supervise import Tasks
from keys.api_key import digest, is_well_formed
from keys.errors import (
    CredentialMissing,
    KeyExpired,
    KeyInvalid,
    KeyMalformed,
    KeysError,
    KeysUnavailable,
)
from keys.principal import Principal
from keys.store import Pool, find_principals

log = logging.getLogger("keys.cache")

# Half way to its end an answer is looked up again, while callers still get the old one.
RENEW_AT = 0.6
STALE_WHEN_BOOK_AWAY_S = 900
LOOKUPS_AT_ONCE = 8
LOOKUPS_WAITING_MAX = 1000


class _Entry:
    __slots__ = ("caller", "found_at", "renewing")

    def __init__(self, caller: Caller | None, found_at: float) -> None:
        self.caller = caller
        self.found_at = found_at
        self.renewing = False


class Authenticator:
    """Credentials to callers, for one worker."""

    def __init__(self, settings: Settings, pool: Pool, tasks: Tasks) -> None:
        keys = settings.keys
        self._limits = settings.limits
        self._pool = pool
        self._tasks = tasks
        self._peppers = [pepper.reveal().encode() for pepper in (keys.pepper,) if pepper]
        if keys.pepper_previous:
            self._peppers.append(keys.pepper_previous.reveal().encode())
        self._ttl_s = keys.cache_ttl_ms / 1000
        self._entries_max = keys.cache_entries_max
        self._entries: dict[bytes, _Entry] = {}
        self._lookups: dict[bytes, asyncio.Future[None]] = {}
        self._slots = asyncio.Semaphore(LOOKUPS_AT_ONCE)

    async def authenticate(self, headers: Mapping[bytes, bytes]) -> Caller:
        """The caller behind the credential of a request. Raises a KeysError."""
        key = credential_of(headers)
        if not is_well_formed(key) or key.startswith(b"fb_op_"):
            raise KeyMalformed
        sealed = digest(key, self._peppers[0])
        entry = self._entries.get(sealed)
        age_s = time.monotonic() - entry.found_at if entry is not None else self._ttl_s
        if age_s >= self._ttl_s:
            entry = await self._look_up(key, sealed, entry)
        elif age_s >= self._ttl_s * RENEW_AT and entry is not None and not entry.renewing:
            entry.renewing = True
            self._tasks.start(self._renew(key, sealed, entry), "keys.renew")
        assert entry is not None
        return self._checked(entry.caller, sealed)

    def _checked(self, caller: Caller | None, sealed: bytes) -> Caller:
        if caller is None:
            raise KeyInvalid
        principal = caller.principal
        # With a previous pepper in use the stored digest is another one than `sealed`.
        if len(self._peppers) == 1 and not hmac.compare_digest(principal.digest, sealed):
            raise KeyInvalid
        if principal.expires_at is not None and principal.expires_at <= datetime.now(UTC):
            raise KeyExpired
        if not principal.account_active:
            raise AccountFrozen
        return caller

    async def _look_up(self, key: bytes, sealed: bytes, stale: _Entry | None) -> _Entry:
        """Read the book once for all who ask for the same key at the same time."""
        shared = self._lookups.get(sealed)
        if shared is not None:
            await asyncio.shield(shared)
            return self._entries.get(sealed) or await self._look_up(key, sealed, stale)
        if len(self._lookups) >= LOOKUPS_WAITING_MAX:
            raise KeysUnavailable
        shared = self._lookups[sealed] = asyncio.get_running_loop().create_future()
        try:
            return await self._read(key, sealed)
        except KeysUnavailable:
            if stale is None or time.monotonic() - stale.found_at > STALE_WHEN_BOOK_AWAY_S:
                raise
            return stale
        finally:
            del self._lookups[sealed]
            shared.set_result(None)

    async def _renew(self, key: bytes, sealed: bytes, entry: _Entry) -> None:
        try:
            await self._read(key, sealed)
        except KeysError:
            log.warning("key.renew_failed")
        finally:
            entry.renewing = False

    async def _read(self, key: bytes, sealed: bytes) -> _Entry:
        digests = [sealed, *(digest(key, pepper) for pepper in self._peppers[1:])]
        async with self._slots:
            found = await find_principals(self._pool, digests)
        if len(self._entries) >= self._entries_max:
            self._forget_some()
        caller = self._caller(found[0]) if found else None
        entry = self._entries[sealed] = _Entry(caller, time.monotonic())
        return entry

    def _forget_some(self) -> None:
        """Make room: a tenth, oldest first (dicts keep the order of insertion)."""
        for sealed in list(self._entries)[: max(1, self._entries_max // 10)]:
            del self._entries[sealed]

    def _caller(self, principal: Principal) -> Caller:
        limits = self._limits
        scopes = spend_scopes(
            principal.account_id,
            principal.app_key_id,
            account_open_max=principal.account_open_max or limits.open_requests_per_account,
            key_open_max=principal.key_open_max or limits.open_requests_per_key,
        )
        return Caller(
            principal=principal,
            scopes=scopes,
            account_text=f"acct_{id_text(principal.account_id)}",
            key_text=f"key_{id_text(principal.app_key_id)}",
        )


def credential_of(headers: Mapping[bytes, bytes]) -> bytes:
    """The key from `Authorization: Bearer`, `x-api-key` or `api-key`. Raises CredentialMissing."""
    authorization = headers.get(b"authorization")
    if authorization is not None:
        scheme, _, key = authorization.strip().partition(b" ")
        if scheme.lower() != b"bearer":
            raise KeyMalformed
        return key.strip()
    key = headers.get(b"x-api-key") or headers.get(b"api-key") or b""
    if not key:
        raise CredentialMissing
    return key.strip()
