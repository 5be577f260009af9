"""What an operator asks first about the till: is it open, who lives, what is in it. Read-only.

Failure: TillUnavailable, TillRefused, BookUnavailable.
"""

from collections import Counter
from typing import Any

import msgspec

from billing.audit_till import begun_ms
from billing.book import Connection
from billing.fleet import list_workers, read_epoch
from billing.till_entries import PLAINTEXT_KEY, Shard
from billing.till_epoch import SHARDS, epoch_key
from billing.till_scan import TillScan

# What was set aside, and how it is read, by its type.
ASIDE = "fb:{s??}:odd:*"
READERS: dict[bytes, tuple[str, tuple[int, ...]]] = {
    b"hash": ("HGETALL", ()),
    b"string": ("GET", ()),
    b"zset": ("ZRANGE", (0, -1)),
    b"list": ("LRANGE", (0, -1)),
    b"set": ("SMEMBERS", ()),
}
SHOWN_CHARS_MAX = 4000


class Status(msgspec.Struct, kw_only=True):
    """Ages are those of the oldest; 0 when there is none."""

    state: str = "open"
    """open; closed: no new request is admitted; restarted: the next worker that looks ends the
    epoch."""
    epoch: int
    epoch_age_s: int
    shards_open: int
    server: str
    """The run id of the till's server, as it says itself; '' when it does not say."""
    server_of_epoch: str
    """The one that this epoch began with."""
    memory_bytes: int
    memory_bytes_max: int
    """0: no limit."""
    workers: list[dict[str, Any]]
    holds: int = 0
    held_nanos: int = 0
    oldest_hold_s: int = 0
    leases_over: int = 0
    """Holds that nobody renewed in time: a sweeper ends them."""
    oldest_lease_over_s: int = 0
    outbox: int = 0
    uncommitted_nanos: int = 0
    oldest_outbox_s: int = 0
    accounts: int = 0
    keys: int = 0
    budgets: int = 0
    """Windows of budgets."""
    unreadable: int = 0
    """What no script wrote: `farebox audit` names it."""
    set_aside: int = 0
    """What rebuilds could not read and kept."""


async def read_status(conn: Connection, till: TillScan) -> Status:
    """Look at everything once."""
    server, memory = await till.run_all([("INFO", "server"), ("INFO", "memory")])
    epoch = await read_epoch(conn)
    epochs = await till.run_all([("GET", epoch_key(number)) for number in range(SHARDS)])
    found = Counter(epochs_of(epochs))
    status = Status(
        epoch=epoch.number,
        epoch_age_s=max(epoch.age_ms, 0) // 1000,
        shards_open=found[epoch.number],
        server=run_id_of(server),
        server_of_epoch=epoch.server_run_id,
        memory_bytes=int(_facts(memory).get("used_memory", 0)),
        memory_bytes_max=int(_facts(memory).get("maxmemory", 0)),
        workers=await list_workers(conn),
    )
    if status.shards_open < SHARDS:
        status.state = "closed"
    elif status.server and status.server != status.server_of_epoch:
        status.state = "restarted"
    now_ms = await till.now_ms()
    async for shard in till.shards(await till.patterns()):
        _add(status, shard, now_ms)
    return status


def epochs_of(replies: list[Any]) -> list[int]:
    """The numbers among what the shards' epoch keys say; negative where a shard is closed."""
    numbers = (raw for raw in replies if isinstance(raw, bytes))
    return [int(raw) for raw in numbers if raw.removeprefix(b"-").isdigit()]


def run_id_of(told: Any) -> str:
    """What INFO says of the server; '' when we may not ask."""
    return str(_facts(told).get("run_id", ""))


def _facts(reply: Any) -> dict[str, Any]:
    """INFO as redis-py reads it; nothing when we may not ask."""
    return reply if isinstance(reply, dict) else {}


def _add(status: Status, shard: Shard, now_ms: int) -> None:
    status.accounts += len(shard.accounts)
    status.keys += len(shard.keys)
    status.budgets += len(shard.budgets)
    status.unreadable += len(shard.garbage)
    status.set_aside += shard.set_aside
    for hold in shard.holds.values():
        status.holds += 1
        status.held_nanos += hold.nanos
        age_s = (now_ms - begun_ms(hold.request_id, now_ms)) // 1000
        status.oldest_hold_s = max(status.oldest_hold_s, age_s)
    for ends_ms in shard.leases.values():
        if ends_ms < now_ms:
            status.leases_over += 1
            over_s = (now_ms - ends_ms) // 1000
            status.oldest_lease_over_s = max(status.oldest_lease_over_s, over_s)
    for entry in shard.outbox.values():
        status.outbox += 1
        status.uncommitted_nanos += entry.price_nanos
        if entry.receipt is not None:
            age_s = now_ms // 1000 - int(entry.receipt.finished_at.timestamp())
            status.oldest_outbox_s = max(status.oldest_outbox_s, age_s)


async def list_aside(till: TillScan) -> list[dict[str, str]]:
    """What rebuilds set aside: name, and content as text without secrets."""
    found = []
    for key in await till.keys(ASIDE):
        command, more = READERS.get(await till.run("TYPE", key), ("DUMP", ()))
        content = str(await till.run(command, key, *more)).encode()
        text = PLAINTEXT_KEY.sub(b"fb_***", content).decode()[:SHOWN_CHARS_MAX]
        found.append({"key": _name(key), "content": text})
    return found


async def drop_aside(till: TillScan, name: str) -> bool:
    """Forget one of them for good; False when there is no such thing."""
    keys = [key for key in await till.keys(ASIDE) if _name(key) == name]
    return bool(keys) and bool(await till.run("DEL", *keys))


def _name(key: bytes) -> str:
    return key.decode("utf-8", "backslashreplace")
