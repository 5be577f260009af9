"""Limits per minute as OpenAI's `x-ratelimit-*` headers tell them. Pure."""

from billing.standing import Standing, Standings
from gateway.http1.exchange import Header


def rate_headers(standings: Standings) -> list[Header]:
    """Limit, what remains of it, and how long until all of it does; nothing where no limit is."""
    headers: list[Header] = []
    if standings.requests is not None:
        headers += _of(b"requests", standings.requests)
    if standings.tokens is not None:
        headers += _of(b"tokens", standings.tokens)
    return headers


def _of(kind: bytes, standing: Standing) -> list[Header]:
    return [
        (b"x-ratelimit-limit-" + kind, b"%d" % standing.limit),
        (b"x-ratelimit-remaining-" + kind, b"%d" % standing.remaining),
        (b"x-ratelimit-reset-" + kind, duration_text(standing.full_in_ms).encode()),
    ]


def duration_text(ms: int) -> str:
    """As Go prints durations, and OpenAI sends them: 0s, 17ms, 1s, 1.5s, 6m0s."""
    if 0 < ms < 1000:
        return f"{ms}ms"
    minutes, ms = divmod(ms, 60_000)
    seconds, rest = divmod(ms, 1000)
    fraction = f".{rest:03d}".rstrip("0") if rest else ""
    return (f"{minutes}m" if minutes else "") + f"{seconds}{fraction}s"
