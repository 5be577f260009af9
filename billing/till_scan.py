"""A look at the till for operators, and the few words that a command says to it.

Reading goes through SCAN in small steps, so it works while traffic runs; what is read in several
steps belongs to several moments. `TillScan.look` reads one scope with its holds and outbox entries
at one moment. Values are parsed strictly; what cannot be parsed is listed, never guessed.
Failure: TillUnavailable when a step has no answer in time; TillRefused for an error reply.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal
from uuid import UUID

import msgspec
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from billing.errors import TillRefused, TillUnavailable
from billing.receipts import decode_receipt
from billing.till import Scripts
from billing.till_entries import Look, Owner, Parser, Scope, Shard, owner_of
from billing.till_epoch import AccountState
from billing.till_link import NOT_NOW
from billing.till_scopes import account_scope_key, key_scope_key, shard_prefix
from config.clock import Seconds, seconds

CALL_TIMEOUT_S = seconds(3000)
SCAN_TIMEOUT_S = seconds(600_000)
SCAN_COUNT = 1000
CALLS_AT_ONCE = 500
# Above this many keys a pass looks at a 16th or at each shard alone: memory stays bounded.
KEYS_PER_PASS = 200_000
# A shard with more holds or outbox entries than this is cut, and says so.
ENTRIES_MAX = 50_000


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            yield
    except ResponseError as exc:
        if str(exc).startswith(NOT_NOW):
            raise TillUnavailable from exc
        raise TillRefused(str(exc)) from exc
    except (RedisError, OSError, TimeoutError) as exc:
        raise TillUnavailable from exc


@asynccontextmanager
async def _client(url: str) -> AsyncIterator[Any]:
    # TillLink takes valkey:// as well; redis-py knows only its own name for it.
    client: Redis = Redis.from_url(
        re.sub(r"^valkey(s?)://", lambda found: f"redis{found[1]}://", url),
        socket_timeout=CALL_TIMEOUT_S,
        socket_connect_timeout=CALL_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
    )
    try:
        yield client
    finally:
        await client.aclose()


async def set_key_status(
    url: str, account_id: UUID, key_id: UUID, status: Literal["active", "revoked"]
) -> None:
    """Tell `admit` about a key at once. Idempotent. Raises TillUnavailable."""
    async with _client(url) as client, _translated():
        key = key_scope_key(account_id, key_id)
        await client.execute_command("HSET", key, "status", status)


async def set_account_status(
    url: str, account_id: UUID, status: Literal["active", "frozen"]
) -> None:
    """Tell `admit` about an account at once. Idempotent. Raises TillUnavailable."""
    async with _client(url) as client, _translated():
        await client.execute_command("HSET", account_scope_key(account_id), "status", status)


async def tell_account(url: str, state: AccountState, epoch: int) -> str:
    """Bring a change of the book (a grant) to a till that may be warm. Idempotent.

    Returns seeded, kept (it knew) or epoch (the till's content is of another epoch: nothing was
    written, its scopes are seeded from the book when it is in use again). Raises TillUnavailable.
    """
    source = Scripts().seed.source
    keys = (f"{shard_prefix(state.account_id)}epoch", account_scope_key(state.account_id))
    args = (epoch, state.balance_nanos, state.version, state.status, "")
    async with _client(url) as client, _translated():
        reply = await client.execute_command("EVAL", source, len(keys), *keys, *args)
    return str(reply, "ascii")


async def read_account_scope(url: str, account_id: UUID) -> Scope | None:
    """What the till says of one account; None when it is cold. Raises TillUnavailable."""
    async with open_till(url) as till:
        owner = Owner(kind="a", owner_id=account_id)
        return await till.read_scope(shard_prefix(account_id), owner)


@asynccontextmanager
async def open_till(url: str, *, entries_max: int = ENTRIES_MAX) -> AsyncIterator["TillScan"]:
    """A connection for looking. Raises TillUnavailable when the till does not answer."""
    async with _client(url) as client:
        till = TillScan(client, entries_max)
        await till.now_ms()
        yield till


class TillScan:
    """For looking. A shard with more than entries_max holds or outbox entries is read in part."""

    def __init__(self, client: Any, entries_max: int = ENTRIES_MAX) -> None:
        self._client = client
        self._entries_max = entries_max

    async def now_ms(self) -> int:
        """The till's clock, which leases use."""
        async with _translated():
            second, micros = await self._client.execute_command("TIME")
        return int(second) * 1000 + int(micros) // 1000

    async def run(self, *command: Any) -> Any:
        """One command. Raises TillUnavailable or TillRefused."""
        async with _translated():
            return await self._client.execute_command(*command)

    async def run_all(self, commands: Iterable[Sequence[Any]]) -> list[Any]:
        """Many commands at once; an error stands in the place of what was refused."""
        async with _translated():
            pipe = self._client.pipeline(transaction=False)
            for command in commands:
                pipe.execute_command(*command)
            found: list[Any] = await pipe.execute(raise_on_error=False)
        return found

    async def shard(self, name: str) -> Shard:
        """One shard, read again."""
        deadline = asyncio.get_running_loop().time() + SCAN_TIMEOUT_S
        found = await self._keys_by_shard(f"fb:{{{name}}}:*", deadline)
        return await self._read_shard(name, found.get(name, []))

    async def keys(self, pattern: str) -> list[bytes]:
        """The keys of our shards that fit, in order."""
        deadline = asyncio.get_running_loop().time() + SCAN_TIMEOUT_S
        found = await self._keys_by_shard(pattern, deadline)
        return sorted(key for keys in found.values() for key in keys)

    async def patterns(self) -> list[str]:
        """Names of parts, each of which is small enough to be looked at at once."""
        async with _translated():
            return scan_patterns(int(await self._client.execute_command("DBSIZE")))

    async def shards(self, patterns: Iterable[str]) -> AsyncIterator[Shard]:
        """Every shard that has anything, one after the other, each read in several steps."""
        deadline = asyncio.get_running_loop().time() + SCAN_TIMEOUT_S
        for pattern in patterns:
            found = await self._keys_by_shard(pattern, deadline)
            # Every shard has an epoch, most of a small till have nothing else.
            quiet = {name for name, keys in found.items() if len(keys) == 1 and _is_epoch(keys[0])}
            for shard in await self._read_quiet(sorted(quiet)):
                yield shard
            for name in sorted(found.keys() - quiet):
                yield await self._read_shard(name, found.pop(name))
                _check(deadline)

    async def look(self, shard: Shard, owner: Owner, known: Iterable[str] = ()) -> Look:
        """One scope with its holds and outbox entries, all of one moment.

        Holds are found by their leases; `known` names request ids whose lease may be missing.
        """
        key = f"{shard.prefix}{owner.name}"
        holds = [f"{shard.prefix}h:{request_id}" for request_id in known]
        keys = (key, f"{shard.prefix}outbox", f"{shard.prefix}leases", *holds)
        # Without its opening quote `_key_id"` names both kinds of key; clients cannot write it,
        # because a quote inside a JSON string is escaped.
        field = '"billing_account_id"' if owner.kind == "a" else '_key_id"'
        args = (f'{field}:"{owner.owner_id}"', f"{shard.prefix}h:", owner.kind)
        async with _translated():
            fields, held, settled = await self._client.execute_command(
                "EVAL_RO", _look_source, len(keys), *keys, *args
            )
        parser = Parser(shard.prefix)
        scope = parser.scope(owner, key, dict(zip(fields[::2], fields[1::2], strict=True)))
        start = len(shard.prefix) + len("h:")
        if owner.kind == "b":
            held = [each for each in held if _is_of(owner, each[2])]
            settled = [each for each in settled if _is_of(owner, each[2])]
        return Look(
            scope=scope,
            holds={_name(name)[start:]: parser.integer(key, "", n) for name, n, _ in held},
            outbox={_name(name): parser.integer(key, "", price) for name, price, _ in settled},
        )

    async def read_scope(self, prefix: str, owner: Owner) -> Scope | None:
        """One scope of the shard with that prefix; None when the till does not have it."""
        key = f"{prefix}{owner.name}"
        async with _translated():
            fields = await self._client.execute_command("HGETALL", key)
        return Parser("").scope(owner, key, fields) if fields else None

    async def has(self, shard: Shard, request_id: str) -> tuple[bool, bool, bool]:
        """Whether a request has a hold, a lease, an outbox entry; all of one moment."""
        async with _translated():
            pipe = self._client.pipeline(transaction=True)
            pipe.execute_command("EXISTS", f"{shard.prefix}h:{request_id}")
            pipe.execute_command("ZSCORE", f"{shard.prefix}leases", request_id)
            pipe.execute_command("HEXISTS", f"{shard.prefix}outbox", request_id)
            hold, lease, entry = await pipe.execute()
        return bool(hold), lease is not None, bool(entry)

    async def _keys_by_shard(self, pattern: str, deadline: Seconds) -> dict[str, list[bytes]]:
        found: dict[str, set[bytes]] = {}
        cursor = 0
        while True:
            async with _translated():
                cursor, keys = await self._client.execute_command(
                    "SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_COUNT
                )
            for key in keys:
                found.setdefault(key[4:7].decode("ascii", "replace"), set()).add(key)
            if not int(cursor):
                return {name: sorted(keys) for name, keys in found.items()}
            _check(deadline)

    async def _read_quiet(self, names: Sequence[str]) -> list[Shard]:
        """Shards that hold nothing but their epoch, all in one round trip."""
        shards = [Shard(name=name, prefix=f"fb:{{{name}}}:") for name in names]
        async with _translated():
            pipe = self._client.pipeline(transaction=False)
            for shard in shards:
                pipe.execute_command("GET", f"{shard.prefix}epoch")
            found = await pipe.execute(raise_on_error=False) if shards else []
        for shard, epoch in zip(shards, found, strict=True):
            parser = Parser(shard.prefix)
            parser.put_epoch(shard, epoch)
            shard.garbage, shard.secrets = parser.garbage, parser.secrets
        return shards

    async def _read_shard(self, name: str, keys: Sequence[bytes]) -> Shard:
        shard = Shard(name=name, prefix=f"fb:{{{name}}}:")
        parser = Parser(shard.prefix)
        await self._read_lists(shard, parser)
        hashes = {f"{shard.prefix}h:{request_id}".encode() for request_id in shard.leases}
        for key in keys:
            if key[len(shard.prefix) :][:2] in {b"a:", b"k:", b"b:", b"h:"}:
                hashes.add(key)
            elif key[len(shard.prefix) :].startswith(b"odd:"):
                shard.set_aside += 1
            elif key[len(shard.prefix) :] not in {b"epoch", b"outbox", b"leases"}:
                shard.other_keys += 1
        wanted = sorted(hashes)
        shard.is_cut = shard.is_cut or len(wanted) > 2 * ENTRIES_MAX
        for start in range(0, min(len(wanted), 2 * ENTRIES_MAX), CALLS_AT_ONCE):
            part = wanted[start : start + CALLS_AT_ONCE]
            # An error stands in the place of what is no hash.
            found = await self.run_all([("HGETALL", key) for key in part])
            for key, fields in zip(part, found, strict=True):
                parser.put(shard, key, fields)
        shard.garbage, shard.secrets = parser.garbage, parser.secrets
        return shard

    async def _read_lists(self, shard: Shard, parser: Parser) -> None:
        """The epoch, the leases and the outbox."""
        prefix = shard.prefix
        async with _translated():
            pipe = self._client.pipeline(transaction=False)
            pipe.execute_command("GET", f"{prefix}epoch")
            pipe.execute_command("ZRANGE", f"{prefix}leases", 0, self._entries_max, "WITHSCORES")
            epoch, leases = await pipe.execute(raise_on_error=False)
        parser.put_epoch(shard, epoch)
        parser.put_leases(shard, leases)
        cursor = b"0"
        while True:
            async with _translated():
                reply = await self._scan_outbox(f"{prefix}outbox", cursor)
            cursor = reply[0]
            parser.put_outbox(shard, reply[1])
            shard.is_cut = max(len(shard.leases), len(shard.outbox)) > self._entries_max
            if shard.is_cut or cursor == b"0":
                return

    async def _scan_outbox(self, key: str, cursor: bytes) -> Any:
        """[next cursor, fields and values], or the error when the key is no hash."""
        pipe = self._client.pipeline(transaction=False)
        pipe.execute_command("HSCAN", key, cursor, "COUNT", SCAN_COUNT)
        (reply,) = await pipe.execute(raise_on_error=False)
        if isinstance(reply, ResponseError):
            return b"0", reply
        return str(reply[0]).encode(), reply[1]


def _name(raw: bytes) -> str:
    """Of something in our keys, even of what nobody of us wrote."""
    return raw.decode("utf-8", "backslashreplace")


def _is_of(owner: Owner, raw: bytes) -> bool:
    """Whether a draft or receipt is of that very scope: one key has budgets of many days."""
    try:
        found = owner_of(owner.kind, decode_receipt(raw))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return found is not None and found.name == owner.name


def _is_epoch(key: bytes) -> bool:
    return key.endswith(b":epoch") and key.count(b":") == 2


def scan_patterns(total: int) -> list[str]:
    """What to SCAN for, pass after pass."""
    digits = "0123456789abcdef"
    if total <= KEYS_PER_PASS:
        return ["fb:{s??}:*"]
    if total <= KEYS_PER_PASS * 16:
        return [f"fb:{{s{high}?}}:*" for high in digits]
    return [f"fb:{{s{high}{low}}}:*" for high in digits for low in digits]


def _check(deadline: Seconds) -> None:
    if asyncio.get_running_loop().time() > deadline:
        raise TillUnavailable


# Read-only, and only in an operator's hands: the seven scripts of the request path are files.
# KEYS  1 scope   2 outbox   3 leases   4.. holds that may have no lease
# ARGV  1 what a draft or receipt of this scope contains   2 prefix of the keys of holds
#       3 b for a budget: other windows contain the same, so the caller looks into each
# Reply {fields of the scope, {{hold key, nanos, draft}..}, {{request id, price, receipt}..}}
#       draft and receipt only for a budget, else ''
_look_source = """#!lua flags=no-writes
local holds, entries, seen = {}, {}, {}
local function look(key)
  if seen[key] then return end
  seen[key] = true
  local f = redis.call('HMGET', key, 'nanos', 'draft')
  if f[2] and string.find(f[2], ARGV[1], 1, true) then
    holds[#holds + 1] = {key, f[1] or '', ARGV[3] == 'b' and f[2] or ''}
  end
end
for _, id in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do look(ARGV[2] .. id) end
for i = 4, #KEYS do look(KEYS[i]) end
local all = redis.call('HGETALL', KEYS[2])
for i = 1, #all, 2 do
  if string.find(all[i + 1], ARGV[1], 1, true) then
    local receipt = ARGV[3] == 'b' and string.match(all[i + 1], ' (.*)') or ''
    entries[#entries + 1] = {all[i], string.match(all[i + 1], '^(%d+) ') or '', receipt}
  end
end
return {redis.call('HGETALL', KEYS[1]), holds, entries}
"""
