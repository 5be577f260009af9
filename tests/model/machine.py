"""Random operations, faults and messages against a small world, checked after each step."""

import asyncio
import contextlib
import sys
from collections.abc import Coroutine
from typing import Any, ClassVar, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from billing.errors import BillingError
from tests.model import laws
from tests.model.heal import heal
from tests.model.people import Request, Worker
from tests.model.seen import Look
from tests.model.wire import Fate
from tests.model.world import PAST_MAX, Ledger, Stage, World

T = TypeVar("T")

SLOTS = st.integers(0, 1)
PURSES = st.integers(0, 3)
HOLDS = st.integers(0, 60)
PICKS = st.integers(0, 11)
FATES = st.lists(
    st.sampled_from([Fate.OK, Fate.LOST, Fate.MUTE, Fate.LATE, Fate.TWICE]), max_size=2
)
END_FATES = st.sampled_from([Fate.OK, Fate.OK, Fate.LOST, Fate.MUTE, Fate.LATE, Fate.TWICE])
SHARD_FATES = st.sampled_from([Fate.OK, Fate.OK, Fate.LATE, Fate.MUTE])
# Between two disasters, so that something was built up that can be lost.
CALM_STEPS, LOSS_STEPS = 3, 8


class MoneyMachine(RuleBasedStateMachine):
    """`stage` and `loop` are put here by whoever runs it."""

    stage: ClassVar[Stage]
    loop: ClassVar[asyncio.AbstractEventLoop]
    counts: ClassVar[dict[str, int]]

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    @initialize()
    def begin(self) -> None:
        self.world = World(self.stage)
        self.before: Look | None = None
        self.calm_steps = 0
        self.run(self.world.begin())

    def worker(self, slot: int) -> Worker | None:
        """The worker of that slot, unless it stands still."""
        worker = self.world.workers[slot]
        return None if worker.is_paused else worker

    def open_requests(self) -> list[tuple[Worker, Request]]:
        awake = [worker for worker in self.world.workers if not worker.is_paused]
        return [(worker, request) for worker in awake for request in worker.requests.values()]

    def has_open(self) -> bool:
        return bool(self.open_requests())

    def count(self, what: str, n: int = 1) -> None:
        self.world.counts[what] += n

    def plan(self, fates: list[Fate]) -> None:
        self.world.network.plan.extend(fates)

    # Requests.

    @rule(slot=SLOTS, purse=PURSES, hold=HOLDS, fates=FATES, asks=st.booleans())
    def admit(self, slot: int, purse: int, hold: int, fates: list[Fate], asks: bool) -> None:
        worker = self.worker(slot)
        if worker is not None:
            self.admit_to(worker, purse, hold, fates, asks)

    @rule(slot=SLOTS, purse=PURSES, hold=HOLDS)
    def admit_and_forward(self, slot: int, purse: int, hold: int) -> None:
        """As it goes when nothing happens; a till that is being rebuilt is waited for."""
        worker = self.worker(slot)
        if worker is None:
            return
        if not self.world.has_waited or not worker.till.epoch.is_known:
            for each in self.world.workers:
                if not each.is_paused:
                    self.run(_try(each.look_at_epoch()))
            self.run(self.world.pass_time(0))
        request = self.admit_to(worker, purse, hold, [], True)
        if request.id in worker.requests:
            self.run(_now(lambda: worker.forward(request)))

    def admit_to(
        self, worker: Worker, purse: int, hold: int, fates: list[Fate], asks: bool
    ) -> Request:
        request = self.world.new_request(worker, self.world.purses[purse], hold * 1000)
        self.plan(fates)

        word = self.run(worker.admit(request, asks_book=asks))
        self.count(f"admit {word}")
        if word in {"refused", "rebuilding"}:
            # Its admission may still be on its way; nobody forwards it, so it costs nothing.
            request.is_lost, request.hold, request.asked = True, 0, 0
        elif word == "admitted":
            self.check_admitted(worker, request)
        return request

    def check_admitted(self, worker: Worker, request: Request) -> None:
        """Nothing is admitted to a till that lost something, before a new epoch began there.

        Nor before all had their time to place their holds, nor before its scopes were seeded.
        """
        world, epoch = self.world, worker.till.epoch.number
        assert epoch > world.lost_epoch
        epochs = self.run(world.look()).scope_epochs
        assert {epochs[key] for key in request.purse.money_keys} == {str(epoch)}
        others = [other for other in world.workers if other.requests and not other.is_paused]
        assert world.has_waited or all(other.till.epoch.announced == epoch for other in others)

    @precondition(has_open)
    @rule(pick=PICKS)
    def forward(self, pick: int) -> None:
        worker, request = self.pick_open(pick)
        self.run(_now(lambda: worker.forward(request)))

    @precondition(has_open)
    @rule(pick=PICKS, more=st.integers(0, 20), tokens=st.integers(0, 12), fates=FATES)
    def renew(self, pick: int, more: int, tokens: int, fates: list[Fate]) -> None:
        worker, request = self.pick_open(pick)
        self.plan(fates)
        self.count(f"renew {self.run(worker.renew(request, more * 1000, tokens))}")

    @precondition(has_open)
    @rule(pick=PICKS, share=st.integers(0, 4), fates=FATES)
    def settle(self, pick: int, share: int, fates: list[Fate]) -> None:
        worker, request = self.pick_open(pick)
        self.plan(fates)
        price = request.hold * share // 4 if request.is_sent else 0
        self.count(f"settle {self.run(worker.end(request, price))}")

    @precondition(has_open)
    @rule(pick=PICKS, share=st.integers(0, 4), fate=END_FATES, later=END_FATES)
    def finish(self, pick: int, share: int, fate: Fate, later: Fate) -> None:
        """Settle, commit, confirm: as it goes when nothing happens to the first and the last."""
        worker, request = self.pick_open(pick)
        self.plan([fate])
        price = request.hold * share // 4 if request.is_sent else 0
        self.count(f"settle {self.run(worker.end(request, price))}")
        if not worker.settler._in_flight:
            worker.begin_commit(4)
        self.run(worker.commit(is_answered=True))
        self.plan([later])
        self.confirm_all(worker)

    def confirm_all(self, worker: Worker) -> None:
        """Confirm, and see that nothing is left of what the till heard of."""
        names = {
            settled.request_id for _, group, _ in worker.settler._unconfirmed for settled in group
        }
        self.run(worker.confirm())
        seen = self.run(self.world.look())
        late = {
            settled.request_id for _, group, _ in worker.settler._unconfirmed for settled in group
        }
        assert not (names - late) & (set(seen.holds) | set(seen.outbox))

    def pick_open(self, pick: int) -> tuple[Worker, Request]:
        found = self.open_requests()
        return found[pick % len(found)]

    # Commits.

    @rule(slot=SLOTS, size=st.integers(1, 6), is_answered=st.booleans())
    def begin_commit(self, slot: int, size: int, is_answered: bool) -> None:
        worker = self.worker(slot)
        if worker is None or worker.settler._in_flight or not worker.settler._queue:
            return
        worker.begin_commit(size)
        if not is_answered:
            self.run(worker.commit(is_answered=False))
            self.count("commit unanswered")

    @precondition(lambda self: any(w.settler._in_flight for w in self.world.workers))
    @rule()
    def end_commit(self) -> None:
        for worker in self.world.workers:
            if worker.settler._in_flight and not worker.is_paused:
                self.run(worker.commit(is_answered=True))
                self.count("commit")

    @precondition(lambda self: any(w.settler._unconfirmed for w in self.world.workers))
    @rule(slot=SLOTS, fates=FATES)
    def confirm(self, slot: int, fates: list[Fate]) -> None:
        worker = self.worker(slot)
        if worker is not None and worker.settler._unconfirmed:
            self.plan(fates)
            self.confirm_all(worker)
            self.count("confirm")

    # The till's content.

    @rule(slot=SLOTS, shard_fate=SHARD_FATES, fates=FATES)
    def look_at_epoch(self, slot: int, shard_fate: Fate, fates: list[Fate]) -> None:
        worker = self.worker(slot)
        if worker is None:
            return
        self.world.network.shard_fate = shard_fate
        self.plan(fates)
        announced = worker.till.epoch.announced
        try:
            self.run(worker.look_at_epoch())
        except BillingError as exc:
            self.count(f"epoch {type(exc).__name__}")
        if worker.till.epoch.announced != announced:
            self.count("epoch new")
            if not fates:
                self.run(self.world.network.settle_down())
                seen, ledger = self.run(self.observe())
                laws.check_placed_again(worker, self.world, seen, ledger)

    @rule(slot=SLOTS, purse=st.integers(0, 2), fates=FATES)
    def seed(self, slot: int, purse: int, fates: list[Fate]) -> None:
        worker = self.worker(slot)
        if worker is not None:
            self.plan(fates)
            self.run(_try(worker.till.seed_all(self.world.purses[purse].scopes)))

    @rule(purse=st.integers(0, 2), credit=st.integers(1, 30))
    def grant(self, purse: int, credit: int) -> None:
        self.run(self.world.grant(self.world.purses[purse], credit * 1000))

    @rule(slot=SLOTS, before=st.integers(0, 3))
    def sweep(self, slot: int, before: int) -> None:
        """before: how many calls go through until the sweeper is held up; 3: all."""
        if self.world.rounds[slot] is None:
            if before < 3:
                self.plan([Fate.OK] * before + [Fate.SLOW])
            self.run(self.world.sweep(slot))

    @precondition(lambda self: self.has_open() and self.world.rounds[0] is None)
    @rule(pick=PICKS, does=st.sampled_from(["renew", "forward", "settle", "nothing"]))
    def meet_sweeper(self, pick: int, does: str) -> None:
        """A sweeper saw a hold that was forgotten; before it ends it the worker comes back."""
        self.run(self.world.pass_time(40))
        self.run(self.world.sweep(0))
        self.run(self.world.pass_time(100))
        self.plan([Fate.SLOW])
        self.run(self.world.sweep(0))
        self.world.network.plan.clear()
        self.before = None
        met = [pair for pair in self.open_requests() if self.world.network.is_held_up(pair[1].id)]
        worker, request = met[0] if met else self.pick_open(pick)
        if does == "renew":
            self.count(f"renew {self.run(worker.renew(request, 0, 3))}")
        elif does == "forward":
            self.run(_now(lambda: worker.forward(request)))
        elif does == "settle":
            self.run(worker.end(request, request.hold if request.is_sent else 0))
        self.count("sweeper met")

    @precondition(lambda self: self.has_open() and self.world.rounds[0] is None)
    @rule(pick=PICKS, share=st.integers(0, 4))
    def take_for_dead(self, pick: int, share: int) -> None:
        """A sweeper ends a request that its worker ends itself later."""
        for seconds in (40, 100):
            self.run(self.world.pass_time(seconds))
            self.run(self.world.sweep(0))
        self.before = None
        self.finish(pick, share, Fate.OK, Fate.OK)

    @precondition(lambda self: self.world.network.bag)
    @rule(pick=PICKS, is_last=st.booleans())
    def deliver(self, pick: int, is_last: bool) -> None:
        self.run(self.world.deliver(pick, is_last=is_last))
        self.count("delivered late")

    # What befalls them.

    @precondition(lambda self: self.calm_steps >= CALM_STEPS)
    @rule(is_long=st.booleans())
    def pass_time(self, is_long: bool) -> None:
        self.calm_steps = 0
        self.run(self.world.pass_time(100 if is_long else 50))

    @precondition(lambda self: not self.world.has_waited)
    @rule()
    def wait_for_workers(self) -> None:
        self.run(self.world.pass_time(0))

    @precondition(lambda self: self.calm_steps >= LOSS_STEPS)
    @rule(steps=st.integers(0, PAST_MAX))
    def restart(self, steps: int) -> None:
        self.calm_steps, self.before = 0, None
        self.run(self.world.restart(steps))
        self.count("restart")

    @precondition(lambda self: self.calm_steps >= LOSS_STEPS)
    @rule()
    def flush(self) -> None:
        self.calm_steps, self.before = 0, None
        self.run(self.world.flush())
        self.count("flush")

    @precondition(lambda self: self.calm_steps >= CALM_STEPS)
    @rule(slot=SLOTS, is_end=st.booleans())
    def strike(self, slot: int, is_end: bool) -> None:
        """A worker dies, or stands still, or goes on."""
        world, self.calm_steps = self.world, 0
        if is_end:
            self.run(world.kill(slot))
            self.count("kill")
        elif world.workers[slot].is_paused:
            self.run(world.wake(slot))
        else:
            self.run(world.pause(slot))
            self.count("pause")

    @precondition(lambda self: any(worker.is_paused for worker in self.world.workers))
    @rule(slot=SLOTS)
    def wake(self, slot: int) -> None:
        if self.world.workers[slot].is_paused:
            self.run(self.world.wake(slot))
            self.count("wake")

    # Laws.

    async def observe(self) -> tuple[Look, Ledger]:
        return await self.world.look(), await self.world.ledger()

    @invariant()
    def laws_hold(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        self.run(world.network.settle_down())
        self.run(world.end_rounds())
        seen, ledger = self.run(self.observe())
        laws.check_sums(world, seen)
        laws.check_versions(world, seen, ledger)
        if self.before is not None:
            laws.check_no_steps_back(world, self.before, seen, ledger)
        world.excused = {
            name
            for name in world.excused
            if not laws.is_represented(world.requests[name], seen, ledger)
        }
        world.guessed = {
            name
            for name, request in world.requests.items()
            if laws.guess_of(request, seen, ledger) is not None
        }
        laws.check_nothing_minted(world, seen, ledger)
        laws.check_no_overspend(world, seen, ledger)
        self.before = seen
        self.calm_steps += 1
        self.count("steps")
        world.past.append(seen)
        del world.past[:-PAST_MAX]

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        if sys.exception() is None:
            self.run(heal(self.world))
            for what, n in self.world.counts.items():
                self.counts[what] = self.counts.get(what, 0) + n
        self.run(self.world.leave())


async def _now(act: Any) -> None:
    act()


async def _try(work: Coroutine[Any, Any, Any]) -> None:
    with contextlib.suppress(BillingError):
        await work
