"""The till: what may be spent right now, kept in Valkey/Redis by the scripts in `lua/`.

It can be lost at any moment: scopes are seeded from the book on first use, and nothing that
somebody pays for is only here.
Failure: TillUnavailable when it does not answer within two tries; the request is then refused.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Hashable
from importlib import resources
from typing import Any, NoReturn, TypeVar, cast
from uuid import UUID
from zlib import crc32

import msgspec

from billing.errors import (
    AccountFrozen,
    BookUnavailable,
    InsufficientCredit,
    KeyRevoked,
    TillRefused,
    TillUnavailable,
    TooManyOpenRequests,
)
from billing.money import NANOS_MAX
from billing.till_link import Arg, Script, TillLink
from billing.till_wire import Packed, ScopesWire, words
from config.clock import Seconds
from config.ids import id_text

log = logging.getLogger("billing.till")
T = TypeVar("T")

SHARDS = 256
# A refusal for want of credit asks the book first, but not more often than this for an account.
REFRESH_EVERY_MS = 1000
REFRESH_REMEMBERED_MAX = 10_000
# The first answer may be epoch, then cold, then short: each is mended once.
ADMIT_TRIES = 5
_PLACED = frozenset((b"admitted", b"exists"))


def _script(name: str) -> Script:
    source = resources.files("billing").joinpath("lua", f"{name}.lua").read_text("utf-8")
    return Script(name, source)


class Scripts:
    """All scripts, read once."""

    def __init__(self) -> None:
        self.admit = _script("admit_v1")
        self.forwarded = _script("forwarded_v1")
        self.settle = _script("settle_v1")
        self.confirm = _script("confirm_v1")
        self.seed = _script("seed_v1")

    def all(self) -> list[Script]:
        return [self.admit, self.forwarded, self.settle, self.confirm, self.seed]


class AccountState(msgspec.Struct, frozen=True, kw_only=True):
    """What the book says of an account: the only source of `posted` in the till."""

    account_id: UUID
    balance_nanos: int
    version: int
    status: str


class SpendScopes(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a principal spends from, as the keys and arguments that the scripts want.

    Made once for each principal. Scope 1 is the account, scope 2 the key (open requests only).
    """

    account_id: UUID
    epoch_key: str
    outbox_key: str
    leases_key: str
    hold_prefix: str
    scope_keys: tuple[str, ...]
    kinds: tuple[str, ...]
    open_max: tuple[int, ...]
    wire: ScopesWire


def shard_prefix(account_id: UUID) -> str:
    """`fb:{sNN}:`; the braces put all keys of an account into one cluster slot."""
    return f"fb:{{s{crc32(id_text(account_id).encode()) % SHARDS:02x}}}:"


def account_scope_key(account_id: UUID) -> str:
    return f"{shard_prefix(account_id)}a:{id_text(account_id)}"


def key_scope_key(account_id: UUID, key_id: UUID) -> str:
    return f"{shard_prefix(account_id)}k:{id_text(key_id)}"


def spend_scopes(
    account_id: UUID, key_id: UUID, *, account_open_max: int, key_open_max: int
) -> SpendScopes:
    """The scopes of one key of one account; 0 open requests at most means no limit."""
    prefix = shard_prefix(account_id)
    epoch_key, outbox_key, leases_key = f"{prefix}epoch", f"{prefix}outbox", f"{prefix}leases"
    scope_keys = (account_scope_key(account_id), key_scope_key(account_id, key_id))
    kinds, open_max = ("A", "K"), (account_open_max, key_open_max)
    limits = [part for kind, most in zip(kinds, open_max, strict=True) for part in (kind, most, 0)]
    return SpendScopes(
        account_id=account_id,
        epoch_key=epoch_key,
        outbox_key=outbox_key,
        leases_key=leases_key,
        hold_prefix=f"{prefix}h:",
        scope_keys=scope_keys,
        kinds=kinds,
        open_max=open_max,
        wire=ScopesWire(
            shard_keys=(epoch_key, outbox_key, leases_key),
            hold_prefix=f"{prefix}h:",
            scope_keys=scope_keys,
            kinds=kinds,
            limits=limits,
        ),
    )


class Confirmation(msgspec.Struct, frozen=True, kw_only=True):
    """What a commit returned for one account: its new state and the receipts that are in."""

    state: AccountState
    receipts: list[tuple[SpendScopes, str]]


class Till:
    """The scripts as functions. One for each worker.

    `read_account` reads an account from the book, `read_epoch` the epoch; both raise what the
    book raises.
    """

    def __init__(
        self,
        link: TillLink,
        scripts: Scripts,
        *,
        worker: str,
        lease_ms: int,
        read_account: Callable[[UUID], Awaitable[AccountState]],
        read_epoch: Callable[[], Awaitable[int]],
    ) -> None:
        self.link = link
        self._scripts = scripts
        self._lease_and_worker = words((lease_ms, worker)).encode()
        self._read_account = read_account
        self._read_epoch = read_epoch
        self._epoch = 0
        self._reading: dict[Hashable, asyncio.Future[Any]] = {}
        self._refreshed_ms: dict[UUID, int] = {}

    async def admit(
        self, scopes: SpendScopes, request_id: str, hold_nanos: int, draft: bytes
    ) -> None:
        """Place hold_nanos on every scope of the request, or on none.

        The same request id again gives the same answer. Raises InsufficientCredit,
        TooManyOpenRequests, AccountFrozen or KeyRevoked; TillUnavailable when there was no answer
        (the hold may exist: settle the request with price 0).
        """
        assert 0 <= hold_nanos <= NANOS_MAX
        for _ in range(ADMIT_TRIES):
            if not self._epoch:
                self._epoch = await self._share("epoch", self._read_epoch)
            packed = scopes.wire.admit(
                request_id, self._epoch, hold_nanos, self._lease_and_worker, draft
            )
            asked_at = time.monotonic()
            try:
                reply = await self.link.send(self._scripts.admit, packed)
            except TillUnavailable as exc:
                reply = await self._ask_again(packed, asked_at, exc)
            if reply[0] in _PLACED:
                return
            await self._mend(scopes, hold_nanos, reply)
        # Every answer was a plain no: nothing is held.
        raise TillUnavailable(asked=False)

    async def _ask_again(self, packed: Packed, asked_at: Seconds, first: TillUnavailable) -> Any:
        """Admit once more when there was no answer: two call timeouts in all."""
        if not await self.link.wait_up(asked_at + self.link.call_timeout_s - time.monotonic()):
            raise first
        try:
            return await self.link.send(self._scripts.admit, packed)
        except TillUnavailable as exc:
            exc.asked |= first.asked
            raise

    async def _mend(self, scopes: SpendScopes, hold_nanos: int, reply: list[Any]) -> None:
        """Mend what kept a hold from being placed; raise when it is a refusal that stands."""
        status, index, nanos = reply[0].decode(), reply[1], reply[2]
        if status == "epoch":
            self._epoch = 0
        elif status == "cold":
            # Whoever writes into an empty shard gives it an epoch: ours must not be an old one.
            self._epoch = 0
            await self.seed_from_book(scopes.account_id)
        elif not await self._refreshed(status, scopes.account_id):
            _refuse(status, scopes, index, hold_nanos, nanos)

    def forwarded(self, scopes: SpendScopes, request_id: str) -> None:
        """Mark the hold as forwarded, on the wire when this returns; the reply is not awaited."""
        self._send_forwarded(scopes, request_id)
        self.link.flush()

    def forwarded_soon(self, scopes: SpendScopes, request_id: str) -> asyncio.Future[None]:
        """Mark the hold as forwarded with the other calls of this tick; the reply is not awaited.

        The future is the caller's own. It is done when the mark was handed to the connection, or
        when there is none: it never fails.
        """
        self._send_forwarded(scopes, request_id)
        return self.link.flushed()

    def _send_forwarded(self, scopes: SpendScopes, request_id: str) -> None:
        self.link.send(self._scripts.forwarded, scopes.wire.forwarded(request_id), tells=True)

    def settle(
        self, scopes: SpendScopes, request_id: str, price_nanos: int, receipt: bytes
    ) -> asyncio.Future[Any]:
        """End the hold with its price; the receipt waits in the outbox for the book.

        Returns at once; the future gives [status, available nanos] or fails with
        TillUnavailable / TillRefused. Safe to repeat until the receipt is confirmed.
        """
        assert 0 <= price_nanos <= NANOS_MAX
        packed = scopes.wire.settle(request_id, price_nanos, receipt)
        return self.link.send(self._scripts.settle, packed, tells=True)

    def confirm(self, confirmation: Confirmation) -> asyncio.Future[Any]:
        """Drop committed receipts from the outbox and take over the account's new state.

        Begun when this returns; the future fails with TillUnavailable or TillRefused.
        """
        first = confirmation.receipts[0][0]
        places: dict[str, int] = {first.scope_keys[0]: 1}
        news: list[Arg] = ["A", confirmation.state.balance_nanos, confirmation.state.version]
        holds: list[Arg] = []
        entries: list[Arg] = []
        for scopes, request_id in confirmation.receipts:
            for key, kind in zip(scopes.scope_keys, scopes.kinds, strict=True):
                if key not in places:
                    places[key] = len(places) + 1
                    news += [kind, "", ""]
            holds.append(scopes.hold_prefix + request_id)
            entries += [request_id, ",".join(str(places[key]) for key in scopes.scope_keys)]
        keys = (first.outbox_key, first.leases_key, *places, *holds)
        return self.link.run(self._scripts.confirm, keys, (len(places), *news, *entries))

    async def seed_from_book(self, account_id: UUID) -> None:
        """Tell the till what the book says of an account; many callers share one reading."""

        async def read_and_seed() -> None:
            await self.seed(await self._read_account(account_id))

        await self._share(account_id, read_and_seed)

    async def _share(self, what: Hashable, read: Callable[[], Awaitable[T]]) -> T:
        """The result of read, which runs once for all who ask while it runs.

        When the caller that runs it is cancelled, one of the others takes over.
        """
        while (running := self._reading.get(what)) is not None:
            await asyncio.wait([running])
            if not running.cancelled():
                return cast("T", running.result())
        future = self._reading[what] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_look_at)
        try:
            result = await read()
        except BaseException as exc:
            if isinstance(exc, Exception):
                future.set_exception(exc)
            else:
                future.cancel()
            raise
        finally:
            del self._reading[what]
        future.set_result(result)
        return result

    async def seed(self, state: AccountState) -> None:
        """Write the book's state of an account unless the till's is as new. Idempotent."""
        if not self._epoch:
            self._epoch = await self._share("epoch", self._read_epoch)
        keys = (f"{shard_prefix(state.account_id)}epoch", account_scope_key(state.account_id))
        args = (self._epoch, state.balance_nanos, state.version, state.status)
        if await self.link.run(self._scripts.seed, keys, args) == b"epoch":
            self._epoch = 0

    async def _refreshed(self, status: str, account_id: UUID) -> bool:
        """Ask the book whether a refusal still holds; False when it was asked or is away.

        Credit may have come in, or the account been thawed, without the till being told.
        """
        if status not in {"short", "frozen"} or not self._may_refresh(account_id):
            return False
        try:
            await self.seed_from_book(account_id)
        except BookUnavailable:
            return False
        return True

    def _may_refresh(self, account_id: UUID) -> bool:
        now_ms = int(asyncio.get_running_loop().time() * 1000)
        if now_ms - self._refreshed_ms.get(account_id, -REFRESH_EVERY_MS) < REFRESH_EVERY_MS:
            return False
        if len(self._refreshed_ms) >= REFRESH_REMEMBERED_MAX:
            self._refreshed_ms.clear()
        self._refreshed_ms[account_id] = now_ms
        return True


def _refuse(status: str, scopes: SpendScopes, index: int, needed: int, nanos: int) -> NoReturn:
    if status == "short":
        raise InsufficientCredit(needed_nanos=needed, available_nanos=nanos)
    if status == "busy":
        scope = "account" if index == 1 else "key"
        raise TooManyOpenRequests(scope=scope, limit=scopes.open_max[index - 1])
    if status == "frozen":
        raise AccountFrozen
    if status == "revoked":
        raise KeyRevoked
    raise TillRefused(status)


def _look_at(future: asyncio.Future[Any]) -> None:
    """Take note of a failure that nobody may await."""
    if not future.cancelled() and isinstance(future.exception(), TillRefused):
        log.error("till.refused", extra={"reply": getattr(future.exception(), "reply", "")})
