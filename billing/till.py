"""The till: what may be spent right now, kept in Valkey/Redis by the scripts in `lua/`.

It can be lost at any moment: scopes are seeded from the book on first use, and nothing that
somebody pays for is only here.
Failure: TillUnavailable when it does not answer within two tries; the request is then refused.
"""

import asyncio
import logging
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
from config.ids import id_text

log = logging.getLogger("billing.till")
T = TypeVar("T")

SHARDS = 256
# A refusal for want of credit asks the book first, but not more often than this for an account.
REFRESH_EVERY_MS = 1000
REFRESH_REMEMBERED_MAX = 10_000
# The first answer may be epoch, then cold, then short: each is mended once.
ADMIT_TRIES = 5


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
    admit_args: tuple[Arg, ...]
    kinds: tuple[str, ...]
    open_max: tuple[int, ...]


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
    return SpendScopes(
        account_id=account_id,
        epoch_key=f"{prefix}epoch",
        outbox_key=f"{prefix}outbox",
        leases_key=f"{prefix}leases",
        hold_prefix=f"{prefix}h:",
        scope_keys=(account_scope_key(account_id), key_scope_key(account_id, key_id)),
        admit_args=("A", account_open_max, 0, "K", key_open_max, 0),
        kinds=("A", "K"),
        open_max=(account_open_max, key_open_max),
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
        self._worker = worker
        self._lease_ms = lease_ms
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
            status, index, nanos = await self._try_admit(scopes, request_id, hold_nanos, draft)
            if status in {"admitted", "exists"}:
                return
            if status == "epoch":
                self._epoch = 0
            elif status == "cold":
                # Whoever writes into an empty shard gives it an epoch: ours must not be an old one.
                self._epoch = 0
                await self.seed_from_book(scopes.account_id)
            elif not await self._refreshed(status, scopes.account_id):
                _refuse(status, scopes, index, hold_nanos, nanos)
        # Every answer was a plain no: nothing is held.
        raise TillUnavailable(asked=False)

    async def _try_admit(
        self, scopes: SpendScopes, request_id: str, hold_nanos: int, draft: bytes
    ) -> tuple[str, int, int]:
        keys = (
            scopes.epoch_key,
            scopes.outbox_key,
            scopes.hold_prefix + request_id,
            scopes.leases_key,
            *scopes.scope_keys,
        )
        args: tuple[Arg, ...] = (
            self._epoch,
            request_id,
            hold_nanos,
            self._lease_ms,
            self._worker,
            draft,
            *scopes.admit_args,
        )
        reply = await self._run_twice(self._scripts.admit, keys, args)
        return reply[0].decode(), reply[1], reply[2]

    async def _run_twice(self, script: Script, keys: tuple[Arg, ...], args: tuple[Arg, ...]) -> Any:
        """Run a script; once more when there was no answer: two call timeouts in all."""
        now = asyncio.get_running_loop().time
        first_ends_at = now() + self.link.call_timeout_s
        try:
            return await self.link.run(script, keys, args)
        except TillUnavailable as exc:
            asked = exc.asked
            if not await self.link.wait_up(first_ends_at - now()):
                raise
        try:
            return await self.link.run(script, keys, args)
        except TillUnavailable as exc:
            exc.asked |= asked
            raise

    def forwarded(self, scopes: SpendScopes, request_id: str) -> None:
        """Mark the hold as forwarded, on the wire when this returns; the reply is not awaited."""
        future = self.link.run(self._scripts.forwarded, (scopes.hold_prefix + request_id,), ())
        future.add_done_callback(_look_at)
        self.link.flush()

    def settle(
        self, scopes: SpendScopes, request_id: str, price_nanos: int, receipt: bytes
    ) -> asyncio.Future[Any]:
        """End the hold with its price; the receipt waits in the outbox for the book.

        Returns at once; the future gives [status, available nanos] or fails with
        TillUnavailable / TillRefused. Safe to repeat until the receipt is confirmed.
        """
        assert 0 <= price_nanos <= NANOS_MAX
        keys = (
            scopes.outbox_key,
            scopes.hold_prefix + request_id,
            scopes.leases_key,
            *scopes.scope_keys,
        )
        entry = b"%d %b" % (price_nanos, receipt)
        args: tuple[Arg, ...] = (request_id, price_nanos, entry, *scopes.kinds)
        future = self.link.run(self._scripts.settle, keys, args)
        future.add_done_callback(_look_at)
        return future

    async def confirm(self, confirmation: Confirmation) -> None:
        """Drop committed receipts from the outbox and take over the account's new state."""
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
        await self.link.run(self._scripts.confirm, keys, (len(places), *news, *entries))

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
    """Take note of a failure that nobody may await; the receipt goes to the book all the same."""
    if not future.cancelled() and isinstance(future.exception(), TillRefused):
        log.error("till.refused", extra={"reply": getattr(future.exception(), "reply", "")})
