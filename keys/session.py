"""Sessions of people who signed in, and the nonces of those who are about to.

The id of a session is 256 random bits in a cookie; kept is its SHA-256 only, so whoever reads the
store can impersonate nobody. A nonce works once, for the browser that asked for it. Where they are
kept is the business of a Memory; all of it may be lost, and then people sign in again.
Failure: SessionsUnavailable when the memory does not answer.
"""

import re
import secrets
import time
from hashlib import sha256
from typing import Literal, Protocol
from uuid import UUID

import msgspec

NONCE_TTL_S = 300
UNTAKEN = b"1"
ID_BYTES = 32
# As secrets.token_urlsafe writes so many bytes.
_ID = re.compile(rb"[A-Za-z0-9_-]{43}", re.ASCII)


class Session(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who signed in, with what, and until when (Unix seconds)."""

    user_id: UUID
    account_id: UUID
    virtual_key_id: UUID
    """The account's default, which a session spends from."""
    wallet: str
    kind: Literal["eoa", "contract"]
    created_at: int
    expires_at: int


class SessionTerms(msgspec.Struct, frozen=True, kw_only=True):
    """How long sessions last and how many one user may have."""

    ttl_s: int
    idle_s: int
    contract_ttl_s: int
    per_user_max: int


class Memory(Protocol):
    """Where sessions and nonces are kept. All methods raise SessionsUnavailable."""

    async def put(self, key: str, value: bytes, ttl_s: int) -> None:
        """Keep a value for so long."""

    async def get(self, key: str) -> bytes | None:
        """A value that is still kept."""

    async def drop(self, key: str) -> None:
        """Keep a value no longer."""

    async def take(self, key: str, taker: str) -> bool:
        """Mark the value UNTAKEN as somebody's; True for the first taker alone, also again."""

    async def last(self, key: str, ttl_s: int) -> None:
        """Let a value be kept for so long from now, if it still is."""

    async def add(self, index: str, member: str, ends_at: int, now: int) -> None:
        """Note a member of an index until ends_at, and forget those that ended."""

    async def members(self, index: str) -> list[str]:
        """All members of an index, those first that end first."""

    async def remove(self, index: str, members: list[str]) -> None:
        """Forget members of an index."""


def is_session_id(text: bytes) -> bool:
    """Whether it can be a session's id at all."""
    return _ID.fullmatch(text) is not None


def new_secret() -> str:
    """A new id of a session, or of a browser that is about to sign in."""
    return secrets.token_urlsafe(ID_BYTES)


def sealed(secret: bytes) -> str:
    """What is kept of a secret. 256 random bits need neither salt nor a slow hash."""
    return sha256(secret).hexdigest()


class Sessions:
    """Begins, finds and ends sessions."""

    def __init__(self, memory: Memory, terms: SessionTerms) -> None:
        self._memory = memory
        self._terms = terms

    async def new_nonce(self) -> tuple[str, str]:
        """A nonce, and the secret of the browser that alone may use it."""
        nonce, browser = secrets.token_hex(16), new_secret()
        await self._memory.put(_nonce_key(nonce, browser.encode()), UNTAKEN, NONCE_TTL_S)
        return nonce, browser

    async def use_nonce(self, nonce: str, browser: bytes) -> bool:
        """True once for each nonce, and only for its browser."""
        return await self._memory.take(_nonce_key(nonce, browser), new_secret())

    def lasts_s(self, kind: Literal["eoa", "contract"]) -> int:
        """How long a session may last at all, in seconds."""
        return self._terms.contract_ttl_s if kind == "contract" else self._terms.ttl_s

    async def begin(self, session: Session) -> str:
        """The id of a new session, shown only here. Too many of one user end the oldest."""
        secret = new_secret()
        digest = sealed(secret.encode())
        now = int(time.time())
        index = _index_key(session.user_id)
        ttl_s = max(1, min(self._terms.idle_s, session.expires_at - now))
        await self._memory.add(index, digest, session.expires_at, now)
        await self._memory.put(_session_key(digest), msgspec.json.encode(session), ttl_s)
        known = await self._memory.members(index)
        if digest not in known:
            # It was ended before it began. A session that works is in the index, or `end_all`
            # could never find it.
            await self._memory.drop(_session_key(digest))
        surplus = known[: max(0, len(known) - self._terms.per_user_max)]
        await self._end(index, [one for one in surplus if one != digest])
        return secret

    async def find(self, digest: str) -> Session | None:
        """The session whose id has this digest, unless it ended."""
        found = await self._memory.get(_session_key(digest))
        if found is None:
            return None
        session = msgspec.json.decode(found, type=Session)
        return session if session.expires_at > time.time() else None

    async def touch(self, digest: str, session: Session) -> None:
        """Somebody uses it: idle time begins again, the end of all time stays."""
        left_s = session.expires_at - int(time.time())
        await self._memory.last(_session_key(digest), max(1, min(self._terms.idle_s, left_s)))

    async def end(self, digest: str) -> Session | None:
        """End one session; the session that it was, if it was one."""
        session = await self.find(digest)
        if session is not None:
            await self._end(_index_key(session.user_id), [digest])
        return session

    async def end_all(self, user_id: UUID) -> list[str]:
        """End all sessions of a user; their digests."""
        index = _index_key(user_id)
        known = await self._memory.members(index)
        await self._end(index, known)
        return known

    async def _end(self, index: str, digests: list[str]) -> None:
        for digest in digests:
            await self._memory.drop(_session_key(digest))
        if digests:
            await self._memory.remove(index, digests)


def _session_key(digest: str) -> str:
    return f"fb:session:{digest}"


def _index_key(user_id: UUID) -> str:
    return f"fb:sessions:{user_id.hex}"


def _nonce_key(nonce: str, browser: bytes) -> str:
    """Of the nonce and its browser together: somebody else's try does not even use it up."""
    return f"fb:nonce:{sealed(nonce.encode() + b'.' + browser)}"
