"""How often something may happen, whichever instance it happens at: log-ins, intents, submissions.

The buckets are in the till, one key each with a time to live. Those of admitted requests are part
of `admit` and of its scopes; of them only what it says when there is not enough is here.
Failure: TillUnavailable or TillRefused when the till does not count; then nothing may happen.
"""

from importlib import resources
from typing import Any

from billing.errors import RateLimited
from billing.standing import read_standings
from billing.till_link import Script, TillLink
from billing.till_scopes import SpendScopes

NAME_CHARS_MAX = 200
# With so many in a window their distance, whole microseconds, would no longer be exact.
LIMIT_MAX = 1_000
# The statuses of admit_v3.lua that refuse a request for a limit per minute.
OVER_RATE = frozenset((b"requests", b"tokens"))


def rate_script() -> Script:
    source = resources.files("billing").joinpath("lua", "rate_v1.lua").read_text("utf-8")
    return Script("rate_v1", source)


class Limiter:
    """Named token buckets, shared by all instances."""

    def __init__(self, link: TillLink, script: Script) -> None:
        self._link = link
        self._script = script

    async def take(
        self, name: str, limit_per_window: int, window_s: int, cost: int = 1
    ) -> tuple[bool, int]:
        """Whether `cost` may happen now, else the milliseconds until it may. A no takes nothing.

        At most limit_per_window at once, and as many in each window from then on. The same name
        must always come with the same limit and window. Not safe to repeat: each call takes.
        Raises TillUnavailable or TillRefused; it may have been taken then.
        """
        assert 0 < cost <= limit_per_window <= LIMIT_MAX
        assert 0 < window_s <= 86_400
        assert len(name) <= NAME_CHARS_MAX
        args = (limit_per_window, window_s, cost)
        taken, wait_ms = await self._link.run(self._script, (f"fb:rate:{name}",), args)
        return bool(taken), int(wait_ms)


def over_rate(scopes: SpendScopes, reply: list[Any]) -> RateLimited:
    """The refusal that `admit` replied."""
    most, is_tokens = scopes.limits[reply[1] - 1], reply[0] == b"tokens"
    return RateLimited(
        scope="account" if reply[1] == 1 else "key",
        kind="tokens" if is_tokens else "requests",
        limit=most.tokens_per_minute if is_tokens else most.requests_per_minute,
        retry_after_ms=reply[2],
        standings=read_standings(reply[3]),
    )
