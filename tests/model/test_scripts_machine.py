"""The scripts by themselves against an oracle: three kinds of scopes, any order, any repetition.

What the till holds must be what the oracle says, to the nano, after each step; also when the till
went back to an earlier moment or was emptied.
"""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, ClassVar

from hypothesis import seed
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from billing.errors import TillRefused
from billing.till import Scripts
from billing.till_link import Arg, Script, TillLink
from tests.model.oracle import Oracle, Scope
from tests.model.seen import Look, look, put_back
from tests.model.test_money_machine import bounds

PREFIX = "fb:{s00}:"
EPOCH, OUTBOX, LEASES = f"{PREFIX}epoch", f"{PREFIX}outbox", f"{PREFIX}leases"
# Two accounts, three keys, a budget of one key and one that two keys of an account share.
BUYERS = (
    ("a:1", "k:1", "b:1", "b:2"),
    ("a:1", "k:2", "b:2"),
    ("a:2", "k:3"),
)
MACHINES = 60
LEASE_MS, LONG_MS = 30_000, 1000
PAST_MAX = 8

NAMES = st.integers(0, 5)
EPOCHS = st.integers(1, 3)
NANOS = st.integers(0, 60)
# Limits per minute are used up in shares of 20 tokens, or one request; the till's clock goes on by
# far less than one share of time while a machine runs.
TOKENS = st.sampled_from([0, 20, 40, 100, 400])
SHARE_US, SHARE = 20_000_000, Fraction(1, 3)


def new_oracle() -> Oracle:
    return Oracle(
        {
            "a:1": Scope("A", open_max=4, per_minute=(0, 180)),
            "a:2": Scope("A"),
            "k:1": Scope("K", open_max=2, per_minute=(3, 60)),
            "k:2": Scope("K", per_minute=(6, 60)),
            "k:3": Scope("K"),
            "b:1": Scope("B", limit=90),
            "b:2": Scope("B", limit=120),
        }
    )


class ScriptsMachine(RuleBasedStateMachine):
    """Request n buys as BUYERS[n % 3]; the book says what `history` says."""

    link: ClassVar[TillLink]
    loop: ClassVar[asyncio.AbstractEventLoop]
    scripts: ClassVar[Scripts]

    @initialize()
    def begin(self) -> None:
        self.command("FLUSHALL")
        self.oracle = new_oracle()
        self.history = {name: [(100, 1)] for name in ("a:1", "a:2")}
        self.history |= {name: [(0, 1)] for name in ("b:1", "b:2")}
        self.past: list[tuple[Look, Oracle]] = []
        for to in ("close", "open"):
            self.shard(1, to)
        for name in self.history:
            self.seed(name, 0, 1)

    def command(self, *args: Arg) -> Any:
        return self.loop.run_until_complete(_answer(self.link.command(args)))

    def call(self, script: Script, keys: tuple[str, ...], *args: Arg) -> Any:
        """The answer; `refused` when the script refused to do anything."""
        return self.loop.run_until_complete(_answer(self.link.run(script, keys, args)))

    def ends_like(self, answer: Any, wanted: Any) -> None:
        word = answer[0] if isinstance(answer, list) else answer
        assert (word.decode() if isinstance(word, bytes) else word) == wanted

    def of(self, n: int) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
        """Name, key of the hold, names and keys of the scopes of a request."""
        names = BUYERS[n % len(BUYERS)]
        return f"r{n}", f"{PREFIX}h:r{n}", names, tuple(PREFIX + name for name in names)

    @rule(n=NAMES, nanos=NANOS, epoch=EPOCHS, tokens=TOKENS)
    def admit(self, n: int, nanos: int, epoch: int, tokens: int = 0) -> None:
        name, hold, names, keys = self.of(n)
        limits: list[Arg] = []
        for scope in (self.oracle.scopes[each] for each in names):
            limits += [scope.kind, scope.open_max, scope.limit]
        if self.oracle.is_rated(names):
            limits.append(tokens)
            for scope in (self.oracle.scopes[each] for each in names):
                limits += scope.per_minute
        request = (epoch, name, nanos, LEASE_MS, "w", "{}")
        all_keys = (EPOCH, OUTBOX, hold, LEASES, *keys)
        answer = self.call(self.scripts.admit, all_keys, *request, *limits)
        wanted = self.oracle.admit(name, names, nanos, epoch, tokens)
        if wanted == "rate":
            # The one with the longest wait: which that is may be a matter of microseconds.
            assert (answer[0].decode(), answer[1]) in self.oracle.lacking
            return
        self.ends_like(answer, wanted)
        if wanted == "admitted" and self.oracle.is_rated(names):
            check_standing(answer[3], [self.oracle.scopes[each] for each in names])

    @rule(n=NAMES, nanos=NANOS, tokens=TOKENS)
    def admit_now(self, n: int, nanos: int, tokens: int) -> None:
        self.admit(n, nanos, abs(self.oracle.epoch) or 1, tokens)

    @rule(n=NAMES, more=st.integers(0, 1), tokens=TOKENS)
    def admit_all(self, n: int, more: int, tokens: int) -> None:
        """All that is available, or one more."""
        nanos = self.available(self.of(n)[2]) + more
        if nanos >= 0:
            self.admit_now(n, nanos, tokens)

    def available(self, names: tuple[str, ...]) -> int:
        scopes = [self.oracle.scopes[name] for name in names]
        return min(scope.available for scope in scopes if scope.kind != "K")

    @rule(shares=st.integers(1, 3))
    def time_passes(self, shares: int) -> None:
        """Buckets are full again at a moment: an earlier one is the same as a later now."""
        self.oracle.pass_time(shares * SHARE)
        for name in self.oracle.scopes:
            for field in ("rq", "tk"):
                if self.command("HEXISTS", PREFIX + name, field):
                    self.command("HINCRBY", PREFIX + name, field, -shares * SHARE_US)

    @rule(n=NAMES)
    def forwarded(self, n: int) -> None:
        name, hold, _, _ = self.of(n)
        assert self.call(self.scripts.forwarded, (hold,)) == self.oracle.forwarded(name)

    @rule(n=NAMES, wanted=st.integers(0, 120), epoch=EPOCHS, is_new=st.booleans())
    def renew(self, n: int, wanted: int, epoch: int, is_new: bool) -> None:
        name, hold, names, keys = self.of(n)
        limits: list[Arg] = []
        for scope in (self.oracle.scopes[each] for each in names):
            limits += [scope.kind, scope.limit]
        request = (epoch, name, LEASE_MS, "F", "{}", wanted, "w" if is_new else "")
        answer = self.call(
            self.scripts.renew, (EPOCH, OUTBOX, LEASES, hold, *keys), *request, *limits
        )
        word, held = self.oracle.renew(name, names, wanted, epoch, is_new)
        self.ends_like(answer, word)
        assert answer[1] == held

    @precondition(lambda self: self.oracle.holds)
    @rule(n=NAMES, more=st.integers(1, 40))
    def grow(self, n: int, more: int) -> None:
        names = sorted(self.oracle.holds)
        name = names[n % len(names)]
        wanted = self.oracle.holds[name].nanos + more
        self.renew(int(name[1:]), wanted, abs(self.oracle.epoch) or 1, False)

    @precondition(lambda self: self.oracle.holds)
    @rule(n=NAMES, more=st.integers(0, 1))
    def grow_all(self, n: int, more: int) -> None:
        """By all that is available, or one more."""
        names = sorted(self.oracle.holds)
        name = names[n % len(names)]
        hold = self.oracle.holds[name]
        wanted = hold.nanos + max(self.available(hold.scopes), 0) + more
        self.renew(int(name[1:]), wanted, abs(self.oracle.epoch) or 1, False)

    @rule(n=NAMES, price=NANOS, used=st.lists(TOKENS, min_size=2, max_size=2))
    def settle(self, n: int, price: int, used: list[int]) -> None:
        name, hold, names, keys = self.of(n)
        kinds = [self.oracle.scopes[each].kind for each in names]
        tail = ["T"] if any(self.oracle.scopes[each].per_minute[1] for each in names) else []
        fields = {"input_tokens": used[0], "output_tokens": used[1]}
        receipt = json.dumps({key: n for key, n in fields.items() if n}, separators=(",", ":"))
        request: list[Arg] = [name, price, f"{price} {receipt}", *kinds, *tail]
        answer = self.call(self.scripts.settle, (OUTBOX, hold, LEASES, *keys), *request)
        self.ends_like(answer, self.oracle.settle(name, names, price, sum(used)))
        if answer != "refused":
            assert answer[1] == self.oracle.scopes[names[0]].available

    @precondition(lambda self: self.oracle.holds)
    @rule(n=NAMES, price=NANOS, used=st.lists(TOKENS, min_size=2, max_size=2))
    def settle_open(self, n: int, price: int, used: list[int]) -> None:
        names = sorted(self.oracle.holds)
        name = names[n % len(names)]
        self.settle(int(name[1:]), min(price, self.oracle.holds[name].nanos), used)

    @rule(n=NAMES, price=NANOS, state=st.sampled_from("HF"))
    def sweep(self, n: int, price: int, state: str) -> None:
        name, hold, names, keys = self.of(n)
        kinds = [self.oracle.scopes[each].kind for each in names]
        request = (name, LONG_MS, state, price, f"{price} {{}}")
        answer = self.call(self.scripts.sweep, (OUTBOX, hold, LEASES, *keys), *request, *kinds)
        self.ends_like(answer, self.oracle.sweep(name, names, state, price))

    @precondition(lambda self: self.oracle.holds)
    @rule(n=NAMES, price=NANOS)
    def sweep_open(self, n: int, price: int) -> None:
        names = sorted(self.oracle.holds)
        name = names[n % len(names)]
        hold = self.oracle.holds[name]
        self.lease_ends(int(name[1:]))
        self.sweep(int(name[1:]), min(price, hold.nanos), hold.state)

    @rule(n=NAMES)
    def lease_ends(self, n: int) -> None:
        name = self.of(n)[0]
        if name in self.oracle.holds:
            self.oracle.holds[name].is_over = True
            self.command("ZADD", LEASES, 1, name)

    @rule(ns=st.lists(NAMES, min_size=1, max_size=4), back=st.integers(0, 3), a_first=st.booleans())
    def confirm(self, ns: list[int], back: int, a_first: bool) -> None:
        """Requests of one account, some of them twice; the book's word may be an old one."""
        buyers = {0, 1} if a_first else {2}
        ns = [n for n in ns if n % len(BUYERS) in buyers]
        if not ns:
            return
        places: list[str] = []
        for n in ns:
            places += [name for name in self.of(n)[2] if name not in places]
        said = {name: self.said(name, back) for name in places if name in self.history}
        news: list[Arg] = []
        for name in places:
            news += [self.oracle.scopes[name].kind, *(said.get(name, ("", "")))]
        entries: list[Arg] = []
        for n in ns:
            indexes = ",".join(str(places.index(name) + 1) for name in self.of(n)[2])
            entries += [self.of(n)[0], indexes]
        keys = (OUTBOX, LEASES, *(PREFIX + name for name in places), *(self.of(n)[1] for n in ns))
        answer = self.call(self.scripts.confirm, keys, len(places), *news, *entries)
        receipts = [(self.of(n)[0], self.of(n)[2]) for n in ns]
        assert answer == self.oracle.confirm(said, receipts)

    def said(self, name: str, back: int) -> tuple[int, int]:
        """What the book says of a scope, or said that many changes ago."""
        return self.history[name][max(len(self.history[name]) - 1 - back, 0)]

    @rule(name=st.sampled_from(["a:1", "a:2", "b:1", "b:2"]), change=st.integers(-40, 40))
    def book_changes(self, name: str, change: int) -> None:
        posted, version = self.history[name][-1]
        self.history[name].append((posted + change, version + 1))

    @rule(name=st.sampled_from(["a:1", "a:2", "b:1", "b:2"]), back=st.integers(0, 3), epoch=EPOCHS)
    def seed(self, name: str, back: int, epoch: int) -> None:
        posted, version = self.said(name, back)
        status = "active" if name.startswith("a") else ""
        keys, ends_s = (EPOCH, PREFIX + name), "" if name.startswith("a") else 1
        answer = self.call(self.scripts.seed, keys, epoch, posted, version, status, ends_s)
        self.ends_like(answer, self.oracle.seed(name, posted, version, epoch))

    @rule(name=st.sampled_from(["a:1", "a:2", "b:1", "b:2"]))
    def seed_now(self, name: str) -> None:
        self.seed(name, 0, abs(self.oracle.epoch) or 1)

    @rule(epoch=EPOCHS, to=st.sampled_from(["open", "close"]))
    def shard(self, epoch: int, to: str) -> None:
        answer = self.call(self.scripts.shard, (EPOCH,), epoch, to)
        self.ends_like(answer, self.oracle.shard(epoch, to))

    @precondition(lambda self: abs(self.oracle.epoch) < 9)
    @rule(names=st.sets(st.sampled_from(["a:1", "a:2", "b:1", "b:2"]), min_size=1), n=NAMES)
    def epoch_begins(self, names: set[str], n: int) -> None:
        """In which only some scopes were seeded; what is open may want to grow."""
        epoch = abs(self.oracle.epoch) + 1
        self.shard(epoch, "close")
        self.shard(epoch, "open")
        for name in sorted(names):
            self.seed(name, 0, epoch)
        if self.oracle.holds:
            self.grow(n, 1)

    @rule(steps=st.integers(1, PAST_MAX))
    def go_back(self, steps: int) -> None:
        if self.past:
            seen, oracle = self.past[max(len(self.past) - steps, 0)]
            self.oracle = oracle.copy()
            self.loop.run_until_complete(put_back(self.link, seen))

    @rule(is_sure=st.booleans())
    def flush(self, is_sure: bool) -> None:
        if is_sure:
            self.oracle.flush()
            self.command("FLUSHALL")

    @invariant()
    def till_is_what_the_oracle_says(self) -> None:
        if not hasattr(self, "oracle"):
            return
        seen, oracle = self.loop.run_until_complete(look(self.link)), self.oracle
        assert int(seen.epochs[0] or 0) == oracle.epoch
        for name, scope in oracle.scopes.items():
            found = seen.scopes.get(PREFIX + name, {})
            assert found.get("posted") == scope.posted, name
            for field in ("version", "uncommitted", "held", "open"):
                assert found.get(field, 0) == getattr(scope, field), (name, field)
            assert int(seen.scope_epochs.get(PREFIX + name) or 0) == scope.epoch, name
            check_sums(oracle, name, scope)
            check_taken((seen.now_ms + 1) * 1000, found, name, scope)
        assert {name: (h.nanos, h.state) for name, h in seen.holds.items()} == {
            name: (hold.nanos, hold.state) for name, hold in oracle.holds.items()
        }
        assert {name: price for name, (price, _) in seen.outbox.items()} == {
            name: price for name, (price, _) in oracle.outbox.items()
        }
        assert set(seen.leases) == set(oracle.holds)
        self.past.append((seen, oracle.copy()))
        del self.past[:-PAST_MAX]


def check_sums(oracle: Oracle, name: str, scope: Scope) -> None:
    holds = [hold for hold in oracle.holds.values() if name in hold.scopes]
    assert scope.open == len(holds)
    is_money = scope.kind != "K"
    assert scope.held == is_money * sum(hold.nanos for hold in holds)
    owed = sum(price for price, names in oracle.outbox.values() if name in names)
    assert scope.uncommitted == is_money * owed


def check_taken(now_us: int, found: dict[str, int], name: str, scope: Scope) -> None:
    """What is taken of limits per minute: as the oracle says, or less by what refilled since."""
    for at, (limit, taken) in enumerate(zip(scope.per_minute, scope.taken, strict=True)):
        if limit:
            ahead_us = found.get(("rq", "tk")[at], 0) - now_us
            share = (1, 20)[at]
            assert taken - share < Fraction(ahead_us * limit, 60_000_000) <= taken or (
                taken == 0 and ahead_us <= 0
            ), (name, at)


def check_standing(told: bytes, scopes: list[Scope]) -> None:
    """The fewest that remain, of requests and tokens."""
    numbers = [int(word) for word in told.split()]
    for at, share in enumerate((1, 20)):
        limited = [scope for scope in scopes if scope.per_minute[at]]
        if not limited:
            assert numbers[3 * at : 3 * at + 3] == [0, 0, 0]
            continue
        least = min(scope.per_minute[at] - scope.taken[at] for scope in limited)
        assert least <= numbers[3 * at + 1] < least + share


async def _answer(future: asyncio.Future[Any]) -> Any:
    try:
        return await future
    except TillRefused:
        return "refused"


@contextmanager
def linked(till_url: str, scripts: Scripts) -> Iterator[type[ScriptsMachine]]:
    with asyncio.Runner() as runner:

        async def start() -> TillLink:
            link = TillLink(
                till_url, scripts.all(), call_timeout_s=5, stall_timeout_s=9, pending_max=9999
            )
            link.start()
            assert await link.wait_up(5)
            return link

        class Linked(ScriptsMachine):
            pass

        Linked.link, Linked.loop = runner.run(start()), runner.get_loop()
        Linked.scripts = scripts
        try:
            yield Linked
        finally:
            runner.run(Linked.link.close())


def test_scripts_do_what_the_oracle_says(fresh_till: str, machines: tuple[int, int]) -> None:
    number, first = machines
    with linked(fresh_till, Scripts()) as kind:
        run_state_machine_as_test(seed(first or 1)(kind), settings=bounds(number or MACHINES))
