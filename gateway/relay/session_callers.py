"""Callers who signed in: a cookie instead of a key. Ended sessions are out within 5 seconds.

What the till and the book said is kept for a short time. Only the till knows sessions, so without
it nobody is let in; without the book a known account goes on: its status is part of `admit`.
Failure: SessionsUnavailable without the till, KeysUnavailable without the book.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace

from billing.errors import AccountFrozen
from billing.single_flight import SingleFlight
from config.settings import Settings
from gateway.origins import SAFE_METHODS, check_origin, cookie_of, session_cookie
from gateway.relay.call import Caller
from keys.errors import CredentialMissing, KeysUnavailable, SessionInvalid
from keys.identity_store import session_principal
from keys.principal import Principal
from keys.session import Session, Sessions, is_session_id, sealed
from keys.store import Pool

TOUCH_EVERY_S = 60
# Signed in people are fewer than keys; whoever is forgotten is looked up again.
ENTRIES_MAX = 10_000


class _Entry:
    __slots__ = ("caller", "found_at", "session", "touched_at")

    def __init__(self, session: Session, caller: Caller, now: float, touched_at: float) -> None:
        self.session = session
        self.caller = caller
        self.found_at = now
        self.touched_at = touched_at


class SessionCallers:
    """Sessions to callers, for one worker."""

    def __init__(
        self,
        settings: Settings,
        pool: Pool,
        sessions: Sessions,
        make_caller: Callable[[Principal], Caller],
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._sessions = sessions
        self._make_caller = make_caller
        self._cookie = session_cookie(settings)
        self._ttl_s = settings.keys.cache_ttl_ms / 1000
        self._entries: dict[str, _Entry] = {}
        self._reading = SingleFlight(_look_at)

    async def authenticate(
        self, headers: Mapping[bytes, bytes], method: bytes, may_be_frozen: bool = False
    ) -> Caller:
        """The caller behind a session's cookie. Raises a KeysError."""
        secret = cookie_of(headers, self._cookie)
        if secret is None:
            raise CredentialMissing
        if not is_session_id(secret):
            raise SessionInvalid
        if method not in SAFE_METHODS:
            check_origin(self._settings, headers)
        digest = sealed(secret)
        entry = self._entries.get(digest)
        if entry is None or time.monotonic() - entry.found_at >= self._ttl_s:
            entry = await self._reading.run(digest, lambda: self._look_up(digest))
        if entry.session.expires_at <= time.time():
            raise SessionInvalid
        if not (entry.caller.principal.account_active or may_be_frozen):
            raise AccountFrozen
        return entry.caller

    def forget(self, digests: list[str]) -> None:
        """These have ended: at once here, elsewhere when their time in the cache is over."""
        for digest in digests:
            self._entries.pop(digest, None)

    async def _look_up(self, digest: str) -> _Entry:
        asked_at = time.monotonic()
        session = await self._sessions.find(digest)
        known = self._entries.pop(digest, None)
        if session is None:
            raise SessionInvalid
        caller = await self._caller(session, digest, known)
        touched_at = known.touched_at if known is not None else -TOUCH_EVERY_S
        if asked_at - touched_at >= TOUCH_EVERY_S:
            await self._sessions.touch(digest, session)
            touched_at = asked_at
        if len(self._entries) >= ENTRIES_MAX:
            for old in list(self._entries)[: ENTRIES_MAX // 10]:
                del self._entries[old]
        entry = self._entries[digest] = _Entry(session, caller, asked_at, touched_at)
        return entry

    async def _caller(self, session: Session, digest: str, known: _Entry | None) -> Caller:
        try:
            principal = await session_principal(
                self._pool, session.account_id, session.user_id, bytes.fromhex(digest)
            )
        except KeysUnavailable:
            if known is None:
                raise
            return known.caller
        if principal is None:
            raise SessionInvalid
        return replace(self._make_caller(principal), session=session)


def _look_at(future: "asyncio.Future[Any]") -> None:
    """Take note of a failure that nobody else may await."""
    if not future.cancelled():
        future.exception()
