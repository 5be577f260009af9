"""Every crash point of the product: which process passes it, and how often a run does at least.

A new crash point is a comment line in the product and a line here.
"""

from dataclasses import dataclass
from typing import Literal

Role = Literal["worker", "work"]
# What else a run needs so that the point is passed.
Company = Literal["", "slow-till", "till-killed", "stands-still", "both-away", "spooled", "poor"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """`nth_max`: the process dies at one of the first so many passes, drawn for each run."""

    name: str
    nth_max: int
    role: Role = "worker"
    company: Company = ""
    turns: int = 1
    """In a round of the campaign: more where the system does not always come to that point."""


POINTS = {
    point.name: point
    for point in (
        Point(name="seed.done", nth_max=1),
        Point(name="admit.begin", nth_max=10),
        Point(name="admit.placed", nth_max=10),
        Point(name="void.begin", nth_max=1, company="slow-till"),
        Point(name="forward.unmarked", nth_max=10),
        Point(name="forward.marked", nth_max=10),
        Point(name="upstream.written", nth_max=10),
        Point(name="forward.answered", nth_max=10),
        Point(name="stream.first", nth_max=6),
        Point(name="stream.passed", nth_max=60),
        Point(name="stream.usage", nth_max=5),
        Point(name="stream.complete", nth_max=5),
        Point(name="stream.done", nth_max=5),
        Point(name="body.settled", nth_max=2),
        Point(name="body.sent", nth_max=2),
        Point(name="fail.settled", nth_max=1),
        Point(name="left.noticed", nth_max=2),
        Point(name="left.settling", nth_max=1),
        Point(name="settle.queued", nth_max=8),
        Point(name="settle.answered", nth_max=8),
        Point(name="commit.begin", nth_max=5),
        Point(name="commit.done", nth_max=5),
        Point(name="confirm.queued", nth_max=5),
        Point(name="confirm.answered", nth_max=5),
        Point(name="link.written", nth_max=40),
        Point(name="link.answered", nth_max=40),
        Point(name="renew.queued", nth_max=2),
        Point(name="renew.answered", nth_max=3),
        Point(name="epoch.begun", nth_max=1, company="till-killed"),
        Point(name="epoch.placed", nth_max=1, company="till-killed"),
        Point(name="epoch.opened", nth_max=2, company="till-killed"),
        Point(name="taken.noticed", nth_max=1, company="stands-still", turns=2),
        Point(name="repeat.seen", nth_max=1, company="stands-still"),
        Point(name="grow.answered", nth_max=4),
        Point(name="credit.exhausted", nth_max=1, company="poor", turns=2),
        Point(name="claim.taken", nth_max=2),
        Point(name="route.next", nth_max=1),
        Point(name="spool.begin", nth_max=1, company="both-away"),
        Point(name="spool.done", nth_max=1, company="both-away"),
        Point(name="replay.begin", nth_max=1, company="spooled"),
        Point(name="replay.posted", nth_max=1, company="spooled"),
        Point(name="adjust.begin", nth_max=2, company="stands-still"),
        Point(name="adjust.written", nth_max=2, company="stands-still"),
        Point(name="sweep.read", nth_max=1, role="work"),
        Point(name="sweep.ended", nth_max=3, role="work"),
        Point(name="takeover.begin", nth_max=1, role="work"),
        Point(name="takeover.done", nth_max=1, role="work"),
        Point(name="takeover.confirmed", nth_max=1, role="work"),
    )
}
