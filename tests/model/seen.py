"""All that the till holds, at one moment; and the till put back to such a moment."""

from typing import Any

import msgspec

from billing import till_epoch
from billing.till_epoch import SHARDS
from billing.till_link import TillLink

EPOCH_KEYS = [till_epoch.epoch_key(shard) for shard in range(SHARDS)]
# KEYS  the epochs
# Reply {now ms, {epochs}, {{key, type, content}..}}
LOOK = """#!lua flags=no-writes
local t = redis.call('TIME')
local found = {}
for _, key in ipairs(redis.call('KEYS', 'fb:*')) do
  local kind = redis.call('TYPE', key)['ok']
  if kind == 'hash' then
    found[#found + 1] = {key, kind, redis.call('HGETALL', key)}
  elseif kind == 'zset' then
    found[#found + 1] = {key, kind, redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')}
  end
end
local now = tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
return {now, redis.call('MGET', unpack(KEYS)), found}
"""
# KEYS  none   ARGV 1 how far the clock goes on, ms. Moves all leases, which is the same.
PASS_TIME = """#!lua
for _, key in ipairs(redis.call('KEYS', 'fb:*:leases')) do
  local all = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  for i = 1, #all, 2 do
    redis.call('ZADD', key, tonumber(all[i + 1]) - tonumber(ARGV[1]), all[i])
  end
end
return 1
"""


class Held(msgspec.Struct, frozen=True):
    """A hold in the till."""

    nanos: int
    state: str


class Look(msgspec.Struct):
    """The till at one moment."""

    now_ms: int
    epochs: list[bytes | None]
    content: list[tuple[bytes, bytes, list[bytes]]]
    scopes: dict[str, dict[str, int]] = {}
    scope_epochs: dict[str, str] = {}
    holds: dict[str, Held] = {}
    outbox: dict[str, tuple[int, bytes]] = {}
    leases: dict[str, int] = {}


async def look(link: TillLink) -> Look:
    """Everything, in one step."""
    now_ms, epochs, content = await link.command(("EVAL_RO", LOOK, len(EPOCH_KEYS), *EPOCH_KEYS))
    seen = Look(now_ms, epochs, content)
    for key, _, values in content:
        _put(seen, key.decode(), values)
    return seen


def _put(seen: Look, key: str, values: list[bytes]) -> None:
    pairs = dict(zip(values[::2], values[1::2], strict=True))
    _, _, tail = key.split(":", 2)
    if tail == "outbox":
        for name, value in pairs.items():
            price, _, receipt = value.partition(b" ")
            seen.outbox[name.decode()] = (int(price), receipt)
    elif tail == "leases":
        seen.leases |= {name.decode(): int(score) for name, score in pairs.items()}
    elif tail.startswith("h:"):
        seen.holds[tail[2:]] = Held(int(pairs[b"nanos"]), pairs[b"state"].decode())
    else:
        seen.scope_epochs[key] = pairs.pop(b"epoch", b"").decode()
        pairs.pop(b"status", None)
        seen.scopes[key] = {name.decode(): int(value) for name, value in pairs.items()}


async def put_back(link: TillLink, seen: Look) -> None:
    """Make the till what it was at that moment."""
    calls: list[Any] = [link.command(("FLUSHALL",))]
    for epoch_key, epoch in zip(EPOCH_KEYS, seen.epochs, strict=True):
        if epoch is not None:
            calls.append(link.command(("SET", epoch_key, epoch)))
    for key, kind, values in seen.content:
        if kind == b"hash":
            calls.append(link.command(("HSET", key, *values)))
        else:
            swapped = [
                part for at in range(0, len(values), 2) for part in values[at : at + 2][::-1]
            ]
            calls.append(link.command(("ZADD", key, *swapped)))
    for call in calls:
        await call
