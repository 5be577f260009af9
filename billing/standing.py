"""How the limits per minute of a request's scopes stand, as `admit` tells it. Pure."""

from typing import NamedTuple


class Standing(NamedTuple):
    """One limit per minute: of the scope that has the fewest remaining."""

    limit: int
    remaining: int
    full_in_ms: int
    """Until all of the limit remains again, when nothing more is asked for."""


class Standings(NamedTuple):
    """None: no such limit."""

    requests: Standing | None = None
    tokens: Standing | None = None


def read_standings(told: bytes | None) -> Standings:
    """What a reply of admit_v3.lua says, if it says anything."""
    if not told:
        return Standings()
    numbers = [int(word) for word in told.split()]
    requests, tokens = Standing(*numbers[:3]), Standing(*numbers[3:])
    return Standings(requests if requests.limit else None, tokens if tokens.limit else None)
