"""Lost, repeated and reordered messages: whatever the order, the till ends right."""

import asyncio
import itertools
import random
from typing import Any
from uuid import UUID

import pytest
import redis.asyncio

from billing.errors import InsufficientCredit, TillRefused
from billing.till import Till
from billing.till_epoch import AccountState
from billing.till_scopes import SpendScopes, spend_scopes
from config.ids import id_text, new_id
from tests.support.tills import (
    InTill,
    Said,
    admit,
    confirmation,
    look_with,
    running_till,
    settle,
)

MESSAGES = ("settle 1", "settle 2", "confirm 1", "confirm 2", "seed old", "seed new")
PRICES = {"1": 100, "2": 0}


class Story:
    """Two requests of one account; the book commits the first, then the second."""

    def __init__(self, till: Till, said: Said, client: Any) -> None:
        self.till = till
        self.client = client
        self.scopes = said.account(1000)
        account_id = self.scopes.account_id
        self.states = {
            "1": AccountState(account_id=account_id, balance_nanos=900, version=2, status="active"),
            "2": AccountState(account_id=account_id, balance_nanos=900, version=2, status="active"),
            "old": said.accounts[account_id],
            "new": AccountState(
                account_id=account_id, balance_nanos=1900, version=3, status="active"
            ),
        }
        self.ids: dict[str, str] = {}
        self.version = 0

    async def begin(self) -> None:
        self.ids = {name: await admit(self.till, self.scopes, 300) for name in ("1", "2")}

    async def deliver(self, message: str) -> None:
        kind, name = message.split()
        if kind == "settle":
            await settle(self.till, self.scopes, self.ids[name], PRICES[name])
        elif kind == "confirm":
            await self.till.confirm(confirmation(self.states[name], self.scopes, self.ids[name]))
        else:
            await self.till.seed(self.states[name])

    async def sweep(self) -> None:
        """What any instance does later: receipts are in the book, so confirm whatever is left."""
        await self.till.confirm(confirmation(self.states["new"], self.scopes, *self.ids.values()))

    async def look(self) -> dict[str, int]:
        """The account's numbers, checked against the holds and outbox entries of this story."""
        scopes = self.scopes
        pipe = self.client.pipeline(transaction=False)
        pipe.hgetall(scopes.scope_keys[0])
        pipe.hget(scopes.scope_keys[1], "open")
        for request_id in self.ids.values():
            pipe.hget(scopes.hold_prefix + request_id, "nanos")
            pipe.hget(scopes.outbox_key, request_id)
        account, key_open, *parts = await pipe.execute()
        seen = {name: int(account[name]) for name in ("posted", "version", "held", "open")}
        seen["uncommitted"] = int(account.get("uncommitted", 0))
        holds = [int(nanos) for nanos in parts[::2] if nanos is not None]
        outbox = [int(value.partition(" ")[0]) for value in parts[1::2] if value is not None]
        assert seen["held"] == sum(holds)
        assert seen["open"] == int(key_open) == len(holds)
        assert seen["uncommitted"] == sum(outbox)
        assert seen["version"] >= self.version
        self.version = seen["version"]
        return {**seen, "outbox": len(outbox)}


async def told(story: Story, messages: tuple[str, ...]) -> None:
    await story.begin()
    for message in messages:
        await story.deliver(message)
        await story.look()
    await story.sweep()
    assert await story.look() == {
        "posted": 1900,
        "version": 3,
        "held": 0,
        "open": 0,
        "uncommitted": 0,
        "outbox": 0,
    }, messages


async def test_every_order_of_messages_ends_in_the_right_state(till_url: str) -> None:
    said = Said()
    client = redis.asyncio.from_url(till_url, decode_responses=True)
    async with running_till(till_url, said) as till, client:
        orders = list(itertools.permutations(MESSAGES))
        for start in range(0, len(orders), 40):
            some = orders[start : start + 40]
            await asyncio.gather(*(told(Story(till, said, client), order) for order in some))


@pytest.mark.parametrize("seed", range(3))
async def test_lost_and_repeated_messages_end_in_the_right_state(till_url: str, seed: int) -> None:
    seeded = random.Random(seed)
    said = Said()
    client = redis.asyncio.from_url(till_url, decode_responses=True)
    async with running_till(till_url, said) as till, client:
        for _ in range(100):
            messages = seeded.choices(MESSAGES, k=seeded.randrange(12))
            await told(Story(till, said, client), tuple(messages))


class Machine:
    """The till against an oracle that knows only the rules of the scripts."""

    def __init__(self, tills: list[Till], said: Said, seed: int) -> None:
        self.random = random.Random(seed)
        self.tills = tills
        self.said = said
        first = said.account(5000)
        self.account_id: UUID = first.account_id
        second = spend_scopes(self.account_id, new_id())
        self.keys: list[SpendScopes] = [first, second]
        self.balance, self.version = 5000, 1
        self.posted, self.seen_version = 5000, 1
        self.holds: dict[str, tuple[SpendScopes, int]] = {}
        self.outbox: dict[str, int] = {}
        self.settled: dict[str, tuple[SpendScopes, int]] = {}
        self.messages: list[tuple[AccountState, list[str]]] = []
        self.steps: dict[str, int] = {}

    @property
    def available(self) -> int:
        held = sum(nanos for _, nanos in self.holds.values())
        return self.posted - sum(self.outbox.values()) - held

    @property
    def till(self) -> Till:
        return self.random.choice(self.tills)

    async def step(self) -> None:
        moves = [
            self.admit,
            self.admit,
            self.end,
            self.end_again,
            self.commit,
            self.hear,
            self.hear,
        ]
        move = self.random.choice([*moves, self.grant, self.seed, self.admit_again, self.forget])
        self.steps[move.__name__] = self.steps.get(move.__name__, 0) + 1
        await move()

    async def admit(self) -> None:
        scopes, nanos = self.random.choice(self.keys), self.random.randrange(1500)
        request_id = id_text(new_id())
        available, reads, refused = self.available, self.said.reads, None
        try:
            await admit(self.till, scopes, nanos, request_id)
        except InsufficientCredit as exc:
            refused = exc
        if self.said.reads > reads:  # short of credit, the book was asked
            assert available < nanos
            self.take(self.said.accounts[self.account_id])
        if refused is not None:
            assert refused.available_nanos == self.available < nanos
            return
        self.holds[request_id] = (scopes, nanos)
        assert self.available >= 0

    async def admit_again(self) -> None:
        if self.holds:
            request_id = self.random.choice(list(self.holds))
            scopes, nanos = self.holds[request_id]
            await admit(self.till, scopes, nanos, request_id)

    async def end(self) -> None:
        if not self.holds:
            return
        request_id = self.random.choice(list(self.holds))
        scopes, nanos = self.holds.pop(request_id)
        price = self.random.randint(0, nanos)
        self.settled[request_id] = (scopes, price)
        if self.random.random() < 0.1:  # the settle is lost; the worker commits all the same
            self.holds[request_id] = (scopes, nanos)
            return
        status, available = await settle(self.till, scopes, request_id, price)
        self.outbox[request_id] = price
        assert (status, available) == (b"settled", self.available)

    async def end_again(self) -> None:
        """A settle that was repeated on the way, maybe after it was confirmed."""
        if self.settled:
            request_id = self.random.choice(list(self.settled))
            scopes, price = self.settled[request_id]
            self.holds.pop(request_id, None)
            self.outbox.setdefault(request_id, price)
            _, available = await settle(self.till, scopes, request_id, price)
            assert available == self.available

    async def commit(self) -> None:
        fresh = [name for name, (_, price) in self.settled.items() if price >= 0]
        batch = self.random.sample(fresh, min(len(fresh), self.random.randint(1, 5)))
        for name in batch:
            price = self.settled[name][1]
            if name not in self.committed():
                self.balance -= price
                self.version += price > 0
        self.messages.append((self.put(), batch))

    def committed(self) -> set[str]:
        return {name for _, batch in self.messages for name in batch} | self.forgotten

    forgotten: frozenset[str] = frozenset()

    async def hear(self) -> None:
        if self.messages:
            state, batch = self.random.choice(self.messages)
            await self.confirm(state, batch)

    async def confirm(self, state: AccountState, batch: list[str]) -> None:
        group = confirmation(state, self.keys[0])
        group.receipts.extend((self.settled[name][0], name) for name in batch)
        if batch:
            await self.till.confirm(group)
            self.take(state)
        for name in batch:
            self.outbox.pop(name, None)
            self.holds.pop(name, None)

    async def forget(self) -> None:
        """A message that is heard no more."""
        if len(self.messages) > 5:
            _, batch = self.messages.pop(self.random.randrange(len(self.messages)))
            self.forgotten |= frozenset(batch)

    async def grant(self) -> None:
        self.balance += self.random.randrange(1000)
        self.version += 1
        self.put()

    async def seed(self) -> None:
        states = [state for state, _ in self.messages] + [self.said.accounts[self.account_id]]
        state = self.random.choice(states)
        await self.till.seed(state)
        self.take(state)

    def put(self) -> AccountState:
        return self.said.put(self.account_id, self.balance, self.version)

    def take(self, state: AccountState) -> None:
        if state.version > self.seen_version:
            self.posted, self.seen_version = state.balance_nanos, state.version

    def check(self, seen: InTill, key_open: list[int]) -> None:
        seen.check()
        assert (seen.posted, seen.version) == (self.posted, self.seen_version)
        assert seen.outbox == self.outbox
        assert seen.holds == {name: nanos for name, (_, nanos) in self.holds.items()}
        of_key = [sum(scopes is key for scopes, _ in self.holds.values()) for key in self.keys]
        assert key_open == of_key


@pytest.mark.parametrize("seed", range(3))
async def test_the_till_agrees_with_an_oracle_after_every_step(till_url: str, seed: int) -> None:
    said = Said()
    client = redis.asyncio.from_url(till_url, decode_responses=True)
    async with running_till(till_url, said) as one, running_till(till_url, said) as two, client:
        machine = Machine([one, two], said, seed)
        await one.seed(said.accounts[machine.account_id])
        for _ in range(300):
            await machine.step()
            seen = [await look_with(client, scopes) for scopes in machine.keys]
            machine.check(seen[0], [each.key_open for each in seen])
        while machine.holds:
            await machine.end()
        everything = list(machine.settled)
        for name in set(everything) - machine.committed():
            machine.balance -= machine.settled[name][1]
            machine.version += machine.settled[name][1] > 0
        await machine.confirm(machine.put(), everything)
        last = await look_with(client, machine.keys[0])

    assert min(machine.steps.values()) > 5
    assert (last.posted, last.held, last.uncommitted) == (machine.balance, 0, 0)
    assert (last.holds, last.outbox, last.key_open) == ({}, {}, 0)


async def test_no_script_writes_before_it_has_checked(till_url: str) -> None:
    """A script that fails half way is not rolled back."""
    said = Said()
    scopes = said.account(1000)
    client = redis.asyncio.from_url(till_url, decode_responses=True)
    async with running_till(till_url, said) as till, client:
        request_id = await admit(till, scopes, 300)
        good = await admit(till, scopes, 10)
        await settle(till, scopes, good, 5)
        await client.hset(scopes.outbox_key, "broken", "no price")
        before = await client.hgetall(scopes.scope_keys[0])
        state = said.put(scopes.account_id, 995, 2)
        with pytest.raises(TillRefused):
            await till.confirm(confirmation(state, scopes, good, "broken"))
        after = await client.hgetall(scopes.scope_keys[0])
        await client.hdel(scopes.outbox_key, "broken")
        await till.confirm(confirmation(state, scopes, good, request_id))
        end = await look_with(client, scopes)

    assert before == after
    assert (end.available, end.outbox) == (995, {})
