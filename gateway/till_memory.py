"""Sessions and nonces in the till's store, beside the money and away from its shards.

Every command has one key, so it works on a cluster; each key goes away by itself.
Failure: SessionsUnavailable when the store does not answer.
"""

from typing import Any

from billing.errors import BillingError
from billing.till_link import Arg, TillLink
from keys.errors import SessionsUnavailable
from keys.session import UNTAKEN


class TillMemory:
    """A keys.session.Memory."""

    def __init__(self, link: TillLink) -> None:
        self._link = link

    async def put(self, key: str, value: bytes, ttl_s: int) -> None:
        await self._run("SET", key, value, "EX", ttl_s)

    async def get(self, key: str) -> bytes | None:
        found: bytes | None = await self._run("GET", key)
        return found

    async def drop(self, key: str) -> None:
        await self._run("DEL", key)

    async def take(self, key: str, taker: str) -> bool:
        # Whoever was first reads what was put; asking again, its own name. Others read another's.
        before = await self._run("SET", key, taker, "XX", "KEEPTTL", "GET")
        return before in (UNTAKEN, taker.encode())

    async def last(self, key: str, ttl_s: int) -> None:
        await self._run("EXPIRE", key, ttl_s)

    async def add(self, index: str, member: str, ends_at: int, now: int) -> None:
        await self._run("ZREMRANGEBYSCORE", index, "-inf", now)
        await self._run("ZADD", index, ends_at, member)
        # The newest of them ends last, or nearly so: sessions of contracts are shorter.
        await self._run("EXPIRE", index, max(1, ends_at - now), "GT")
        if await self._run("TTL", index) == -1:
            await self._run("EXPIRE", index, max(1, ends_at - now))

    async def members(self, index: str) -> list[str]:
        return [member.decode() for member in await self._run("ZRANGE", index, 0, -1)]

    async def remove(self, index: str, members: list[str]) -> None:
        await self._run("ZREM", index, *members)

    async def _run(self, *command: Arg) -> Any:
        """The reply to a command that may be sent twice."""
        try:
            return await self._link.command(command)
        except BillingError:
            await self._link.wait_up(self._link.call_timeout_s)
        try:
            return await self._link.command(command)
        except BillingError as exc:
            raise SessionsUnavailable from exc
