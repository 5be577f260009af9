"""The spool of a worker among its other parts: made, replayed at the start, filled at the end."""

import asyncio
from pathlib import Path

from billing.settler import Settler
from billing.spool import Spool
from billing.spool_replay import Post, Replayed, replay_spool
from config.settings import Settings
from gateway.metrics import Metrics

REPLAY_AGAIN_S = 10.0
# For the disk when a worker stops; the supervisor's patience is longer.
KEEP_REST_S = 2.0


def make_spool(settings: Settings, owner: str, settler: Settler, metrics: Metrics) -> Spool | None:
    """None without a folder: `serve` and `demo` always name one."""
    if not settings.book.spool_dir:
        return None
    return Spool(
        Path(settings.book.spool_dir),
        owner,
        waiting_max=settings.book.receipts_pending_max,
        untaken=settler.untaken,
        on_result=metrics.count_spool,
    )


async def replay_orphans(folder: Path, post: Post, metrics: Metrics) -> None:
    """What dead workers left, until nothing of it is left.

    post tells the till, too: it may have lost the holds, and would let their credit be spent again.
    """
    while True:
        done = await replay_spool(folder, post)
        count_replayed(metrics, done)
        if not done.left:
            return
        await asyncio.sleep(REPLAY_AGAIN_S)


def count_replayed(metrics: Metrics, done: Replayed) -> None:
    counts = {"replayed": done.receipts, "bad": done.bad, "refused": done.refused}
    for result, count in counts.items():
        if count:
            metrics.count_spool(result, count)


async def unposted(settler: Settler, spool: Spool | None) -> dict[str, int]:
    """Keep what a stop with Postgres away leaves: where all of it is, for the log.

    What the till took waits in its outbox; `lost` is what had nowhere to go.
    """
    count = settler.pending
    untaken = len(settler.untaken(0))
    lost = untaken if spool is None else await spool.keep_rest(KEEP_REST_S)
    return {"count": count, "in_till": count - untaken, "spooled": untaken - lost, "lost": lost}
