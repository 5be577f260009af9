"""Everything comes to rest: all is delivered, workers end what they have, sweepers sweep."""

from billing.errors import TillUnavailable
from billing.usage import UsageSource
from tests.model import laws
from tests.model.people import Worker
from tests.model.world import World

# An epoch that is too young, one that nobody ended yet, one that waits for the others.
ROUNDS = 4


async def heal(world: World) -> None:
    """Bring a world to rest and check that everything is right there."""
    network = world.network
    await network.settle_down()
    while network.bag:
        await world.deliver(0, is_last=True)
        await network.settle_down()
    for slot, worker in enumerate(world.workers):
        if worker.is_paused:
            await world.wake(slot)
        await _know_epoch(world, worker)
    for worker in world.workers:
        await _end_all(worker)
    for slot in (0, 1, 0, 1):  # the first looks watch what is over
        await world.pass_time(100)
        await world.sweep(slot)
    for purse in world.purses[:3]:
        await world.workers[0].till.seed_all(purse.scopes)
    await network.settle_down()
    assert sum(worker.refused for worker in world.workers) == 0
    ledger = await world.ledger()
    laws.check_rest(world, await world.look(), ledger)
    for uid, (_, source, _) in ledger.receipts.items():
        world.counts["receipts"] += 1
        world.counts["guessed"] += source == UsageSource.CHECKPOINT
        world.counts["adjusted"] += ledger.adjustment(uid) is not None


async def _know_epoch(world: World, worker: Worker) -> None:
    for _ in range(ROUNDS):
        try:
            await worker.look_at_epoch()
        except TillUnavailable:
            await world.pass_time(0)
        else:
            return
    raise AssertionError("the till stays closed")


async def _end_all(worker: Worker) -> None:
    """Renew, end and post everything that a worker has."""
    for at, request in enumerate(list(worker.requests.values())):
        await worker.renew(request, 0, 1)
        await worker.end(request, request.hold * (at % 3) // 2 if request.is_sent else 0)
    settler = worker.settler
    while settler._in_flight or settler._queue:
        if not settler._in_flight:
            worker.begin_commit(100)
        await worker.commit(is_answered=True)
    while settler._unconfirmed:
        await worker.confirm()
