"""Stage 1: who is calling. Warm credentials cost no I/O; a revoked key is out within 5 seconds.

Answers of the book are kept for a short time, unknown keys too, and renewed in the background
before they get old. When the book is away, a known key goes on for a while: its status is also
part of `admit`.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from functools import partial

from billing.budget_windows import BudgetedScopes
from billing.errors import AccountFrozen, BillingError
from billing.till_scopes import BudgetScope, ScopeLimits, SpendScopes, spend_scopes
from billing.windows import BEGINNING
from config.ids import id_text
from config.settings import Settings
from gateway.relay.bars import bars_of
from gateway.relay.call import Caller
from gateway.relay.own_keys import open_keys
from gateway.relay.session_callers import SessionCallers
from gateway.supervise import Tasks
from keys.api_key import KEY_LENGTH_MAX, digest, is_well_formed
from keys.errors import (
    CredentialMissing,
    KeyExpired,
    KeyInvalid,
    KeyMalformed,
    KeysError,
    KeysUnavailable,
)
from keys.principal import Principal
from keys.session import Sessions
from keys.store import Pool, find_principals

log = logging.getLogger("keys.cache")

# Half way to its end an answer is looked up again, while callers still get the old one.
RENEW_AT = 0.6
STALE_WHEN_BOOK_AWAY_S = 900
# A caller with an old answer does not wait long for a new one, and not at all while the book is
# known to be away: with the time to live of an answer this stays below the 5 s of a revocation.
STALE_WAIT_S, AWAY_S = 0.5, 2.0
LOOKUP_WAIT_S = 5.0
LOOKUPS_AT_ONCE = 4
LOOKUPS_WAITING_MAX = 1000


class _Entry:
    __slots__ = ("caller", "found_at")

    def __init__(self, caller: Caller | None, found_at: float) -> None:
        self.caller = caller
        self.found_at = found_at


class _Lane:
    """Lookups of one sort: who waits in one keeps nobody waiting in another."""

    def __init__(self) -> None:
        self.slots = asyncio.Semaphore(LOOKUPS_AT_ONCE)
        self.under_way: dict[bytes, asyncio.Task[_Entry | None]] = {}


class Authenticator:
    """Credentials to callers, for one worker."""

    def __init__(
        self,
        settings: Settings,
        pool: Pool,
        tasks: Tasks,
        sessions: Sessions | None = None,
        seed_budget: Callable[[SpendScopes], Awaitable[None]] | None = None,
    ) -> None:
        """seed_budget tells the till what the book says of a budget."""
        keys = settings.keys
        self._keys = keys
        self.sessions = (
            None if sessions is None else SessionCallers(settings, pool, sessions, self._caller)
        )
        self._seed_budget = seed_budget
        self._limits = settings.limits
        self._pool = pool
        self._tasks = tasks
        self._prefix = f"fb_{keys.mode}_".encode()
        self._peppers = [pepper.reveal().encode() for pepper in (keys.pepper,) if pepper]
        if keys.pepper_previous:
            self._peppers.append(keys.pepper_previous.reveal().encode())
        self._ttl_s = keys.cache_ttl_ms / 1000
        self._entries_max = keys.cache_entries_max
        self._entries: dict[bytes, _Entry] = {}
        # Anybody can make up keys that look right. However many they send, what is known of real
        # ones does not get old: or revoked secrets would live, and others would be refused.
        self._strangers, self._known = _Lane(), _Lane()
        self._away_until = 0.0

    async def authenticate(
        self,
        headers: Mapping[bytes, bytes],
        method: bytes = b"POST",
        *,
        may_be_frozen: bool = False,
    ) -> Caller:
        """The caller behind the credential of a request. Raises a KeysError.

        Cookies count only when no key was sent. may_be_frozen: also a session of a frozen account.
        """
        try:
            key = credential_of(headers)
        except CredentialMissing:
            if self.sessions is None:
                raise
            return await self.sessions.authenticate(headers, method, may_be_frozen)
        if not key.startswith(self._prefix) or len(key) > KEY_LENGTH_MAX:
            raise _wrong_kind(key)
        sealed = digest(key, self._peppers[0])
        entry = self._entries.get(sealed)
        # What has an entry was looked at when it was looked up.
        if entry is None and not is_well_formed(key):
            raise KeyMalformed
        age_s = time.monotonic() - entry.found_at if entry is not None else self._ttl_s
        if entry is None or age_s >= self._ttl_s:
            entry = await self._look_up(key, sealed, entry)
        elif age_s >= self._ttl_s * RENEW_AT:
            self._start_lookup(key, sealed, entry)
        return _checked(entry.caller)

    async def _look_up(self, key: bytes, sealed: bytes, stale: _Entry | None) -> _Entry:
        """A fresh answer of the book, else a stale one that is not too old."""
        lookup = self._start_lookup(key, sealed, stale)
        if lookup is not None and (stale is None or time.monotonic() >= self._away_until):
            wait_s = LOOKUP_WAIT_S if stale is None else STALE_WAIT_S
            await asyncio.wait([lookup], timeout=wait_s)
            found = None
            if lookup.done():
                found = None if lookup.cancelled() else lookup.result()
            if found is not None:
                return found
            self._away_until = time.monotonic() + AWAY_S
        if stale is None or time.monotonic() - stale.found_at > STALE_WHEN_BOOK_AWAY_S:
            raise KeysUnavailable
        return stale

    def _start_lookup(
        self, key: bytes, sealed: bytes, before: _Entry | None
    ) -> asyncio.Task[_Entry | None] | None:
        """One reading for all who ask for the same key; None when too many wait already."""
        is_known = before is not None and before.caller is not None
        lane = self._known if is_known else self._strangers
        lookup = lane.under_way.get(sealed)
        if lookup is None and (is_known or len(lane.under_way) < LOOKUPS_WAITING_MAX):
            lookup = self._tasks.start(self._read(key, sealed, lane), "keys.lookup")
            lane.under_way[sealed] = lookup
            lookup.add_done_callback(lambda _: lane.under_way.pop(sealed))
        return lookup

    async def _read(self, key: bytes, sealed: bytes, lane: _Lane) -> _Entry | None:
        """Read the book and remember what it said; None when it did not answer."""
        digests = [sealed, *(digest(key, pepper) for pepper in self._peppers[1:])]
        async with lane.slots:
            asked_at = time.monotonic()
            try:
                found = await find_principals(self._pool, digests)
            except KeysUnavailable as exc:
                self._away_until = time.monotonic() + AWAY_S
                log.warning("key.lookup_failed", extra={"error": repr(exc.__cause__)})
                return None
        self._away_until = 0.0
        caller = None
        for principal in found:
            if any(hmac.compare_digest(principal.digest, known) for known in digests):
                caller = self._caller(principal)
                await self._refresh_budget(caller)
        # Renewed answers go to the end: what nobody asks for is forgotten first.
        self._entries.pop(sealed, None)
        if len(self._entries) >= self._entries_max:
            self._forget_some()
        entry = self._entries[sealed] = _Entry(caller, asked_at)
        return entry

    async def _refresh_budget(self, caller: Caller) -> None:
        """Have the till told what was spent, also while its key had no budget or another window.

        What ended then was not held on this budget, so no confirmation told of it.
        """
        if caller.budgeted is None or self._seed_budget is None:
            return
        try:
            await self._seed_budget(caller.scopes_at(time.time()))
        except BillingError as exc:
            # Told with the next answer; a till that lost its content asks by itself.
            log.warning("key.budget_untold", extra={"error": repr(exc)})

    def _forget_some(self) -> None:
        """Make room: a tenth, oldest answers first (dicts keep the order of insertion)."""
        for sealed in list(self._entries)[: max(1, self._entries_max // 10)]:
            del self._entries[sealed]

    def _caller(self, principal: Principal) -> Caller:
        limits, own, key = self._limits, principal.account_limits, principal.key_limits
        account_limits = ScopeLimits(
            own.open_requests or limits.open_requests_per_account,
            own.requests_per_minute or limits.requests_per_minute_per_account,
            own.tokens_per_minute or limits.tokens_per_minute_per_account,
        )
        key_limits = ScopeLimits(
            key.open_requests or limits.open_requests_per_key,
            key.requests_per_minute or limits.requests_per_minute_per_key,
            key.tokens_per_minute or limits.tokens_per_minute_per_key,
        )
        key_id = principal.app_key_id or principal.virtual_key_id
        make = partial(
            spend_scopes,
            principal.account_id,
            key_id,
            account=account_limits,
            key=key_limits,
        )
        own_keys = open_keys(principal, self._keys)
        is_whole = own_keys is None or len(own_keys) == len(principal.upstream_keys)
        return Caller(
            principal=principal,
            scopes=make(),
            budgeted=_budgeted(principal, make),
            account_text=f"acct_{id_text(principal.account_id)}",
            key_text=f"key_{id_text(key_id)}",
            bars=bars_of(principal, has_lost_credential=not is_whole),
            upstream_keys=own_keys,
        )


def _budgeted(principal: Principal, make: Callable[..., SpendScopes]) -> BudgetedScopes | None:
    budget = principal.budget
    if budget is None:
        return None
    scope = BudgetScope(
        virtual_key_id=principal.virtual_key_id,
        window=budget.window,
        starts_at=BEGINNING,
        limit_nanos=budget.nanos,
    )
    return BudgetedScopes(scope, lambda window: make(budget=window))


def _wrong_kind(key: bytes) -> KeysError:
    """What is wrong with a key that is not of this gateway's kind."""
    if not is_well_formed(key) or key.startswith(b"fb_op_"):
        return KeyMalformed()
    return KeyInvalid()  # of a test gateway at a live one, or the other way round


def _checked(caller: Caller | None) -> Caller:
    if caller is None:
        raise KeyInvalid
    principal = caller.principal
    if principal.expires_at is not None and principal.expires_at <= datetime.now(UTC):
        raise KeyExpired
    if not principal.account_active:
        raise AccountFrozen
    return caller


def credential_of(headers: Mapping[bytes, bytes]) -> bytes:
    """The key from `Authorization: Bearer`, `x-api-key` or `api-key`. Raises CredentialMissing."""
    authorization = headers.get(b"authorization")
    if authorization is not None:
        if authorization.startswith(b"Bearer "):  # as nearly everybody writes it
            return authorization[7:].strip()
        scheme, _, key = authorization.strip().partition(b" ")
        if scheme.lower() != b"bearer":
            raise KeyMalformed
        return key.strip()
    key = headers.get(b"x-api-key") or headers.get(b"api-key") or b""
    if not key:
        raise CredentialMissing
    return key.strip()
