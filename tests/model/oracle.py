"""What the scripts do, in plain words: scopes of accounts, keys and budgets of one shard.

Written from the headers of the scripts, not from their code. All of it is a value, so that a
moment can be kept and gone back to.
"""

from copy import deepcopy
from fractions import Fraction
from typing import Literal

import msgspec

Kind = Literal["A", "K", "B"]


class Scope(msgspec.Struct):
    kind: Kind
    limit: int = 0
    open_max: int = 0
    posted: int | None = None
    version: int = 0
    uncommitted: int = 0
    held: int = 0
    open: int = 0
    epoch: int = 0
    per_minute: tuple[int, int] = (0, 0)
    """Limits of requests and tokens; 0: none."""
    taken: tuple[int, int] = (0, 0)
    """What of these is taken now."""

    def take(self, requests: int, tokens: int) -> None:
        """Negative: give back. A bucket is never more than empty or full."""
        limits = zip(self.per_minute, self.taken, (requests, tokens), strict=True)
        first, second = (min(max(taken + more, 0), limit) for limit, taken, more in limits)
        self.taken = (first, second)

    def lacks(self, requests: int, tokens: int) -> list[str]:
        """Of what there is not enough for one more request."""
        limits = zip(self.per_minute, self.taken, (requests, tokens), strict=True)
        words = zip(("requests", "tokens"), limits, strict=True)
        return [word for word, (most, taken, n) in words if most and taken + min(n, most) > most]

    @property
    def available(self) -> int:
        spoken_for = self.uncommitted + self.held
        if self.kind == "B":
            return self.limit - (self.posted or 0) - spoken_for
        return (self.posted or 0) - spoken_for


class Hold(msgspec.Struct):
    nanos: int
    state: str
    scopes: tuple[str, ...]
    is_over: bool = False
    """Whether its lease is."""
    tokens: int | None = None
    """What was asked for of limits of tokens, when it was admitted under any limit per minute."""


class Oracle:
    """The state of one shard, and what each script answers."""

    def __init__(self, scopes: dict[str, Scope]) -> None:
        self.scopes = scopes
        self.holds: dict[str, Hold] = {}
        self.outbox: dict[str, tuple[int, tuple[str, ...]]] = {}
        self.epoch = 0
        """Negative while the shard is closed for it; 0: there is none."""
        self.lacking: list[tuple[str, int]] = []
        """For what, and on which scope, the last request was refused by a limit per minute."""

    def copy(self) -> "Oracle":
        return deepcopy(self)

    def flush(self) -> None:
        for scope in self.scopes.values():
            scope.posted, scope.version, scope.epoch = None, 0, 0
            scope.uncommitted = scope.held = scope.open = 0
            scope.taken = (0, 0)
        self.holds, self.outbox, self.epoch = {}, {}, 0

    def _hold(self, names: tuple[str, ...], nanos: int, opened: int) -> None:
        for name in names:
            scope = self.scopes[name]
            scope.open += opened
            scope.held += nanos if scope.kind != "K" else 0

    def _owe(self, names: tuple[str, ...], price: int) -> None:
        for name in names:
            if self.scopes[name].kind != "K":
                self.scopes[name].uncommitted += price

    def is_rated(self, names: tuple[str, ...]) -> bool:
        return any(any(self.scopes[each].per_minute) for each in names)

    def pass_time(self, minutes: Fraction) -> None:
        for scope in self.scopes.values():
            first, second = (int(limit * minutes) for limit in scope.per_minute)
            scope.take(-first, -second)

    def admit(
        self, name: str, names: tuple[str, ...], nanos: int, epoch: int, tokens: int = 0
    ) -> str:
        if self.epoch != epoch:
            return "epoch" if self.epoch else "lost"
        if name in self.holds or name in self.outbox:
            return "exists"
        for each in names:
            scope = self.scopes[each]
            if scope.kind == "K":
                continue
            if scope.posted is None or scope.epoch != epoch:
                return "cold"
            if scope.available < nanos:
                return "short"
        scopes = [self.scopes[each] for each in names]
        self.lacking = [
            (word, at) for at, scope in enumerate(scopes, 1) for word in scope.lacks(1, tokens)
        ]
        if self.lacking or any(0 < scope.open_max <= scope.open for scope in scopes):
            return "rate" if self.lacking else "busy"
        self._hold(names, nanos, 1)
        for scope in scopes:
            scope.take(1, tokens)
        self.holds[name] = Hold(nanos, "H", names, tokens=tokens if self.is_rated(names) else None)
        return "admitted"

    def forwarded(self, name: str) -> int:
        if name in self.holds:
            self.holds[name].state = "F"
        return int(name in self.holds)

    def renew(
        self, name: str, names: tuple[str, ...], wanted: int, epoch: int, is_new: bool
    ) -> tuple[str, int]:
        if name in self.outbox:
            return "settled", 0
        hold = self.holds.get(name)
        if hold is None:
            if not is_new:
                return "gone", 0
            self._hold(names, wanted, 1)
            self.holds[name] = Hold(wanted, "F", names)
            return "ok", wanted
        hold.is_over, hold.state = False, "F"
        more = wanted - hold.nanos
        if more <= 0:
            return "ok", hold.nanos
        if not is_new:
            refused = self._refuses(names, more, epoch)
            if refused:
                return refused, hold.nanos
        self._hold(names, more, 0)
        hold.nanos = wanted
        return "ok", wanted

    def _refuses(self, names: tuple[str, ...], more: int, epoch: int) -> str:
        if self.epoch != epoch:
            return "wait"
        for scope in (self.scopes[each] for each in names):
            if scope.kind == "K":
                continue
            if scope.posted is None or scope.epoch != epoch:
                return "wait"
            if scope.available < more:
                return "short"
        return ""

    def settle(self, name: str, names: tuple[str, ...], price: int, used: int = 0) -> str:
        if name in self.outbox:
            return "exists"
        hold = self.holds.get(name)
        if hold is not None and price > hold.nanos:
            return "refused"
        if hold is not None:
            self._hold(names, -hold.nanos, -1)
            del self.holds[name]
            for scope in (self.scopes[each] for each in names):
                if hold.tokens is not None and scope.per_minute[1]:
                    scope.take(0, used - min(hold.tokens, scope.per_minute[1]))
        self._owe(names, price)
        self.outbox[name] = (price, names)
        return "unknown" if hold is None else "settled"

    def sweep(self, name: str, names: tuple[str, ...], state: str, price: int) -> str:
        if name in self.outbox:
            return "exists"
        hold = self.holds.get(name)
        if hold is None:
            return "gone"
        if not hold.is_over:
            return "leased"
        if hold.state != state:
            return "changed"
        # It puts no tokens right: by now most of them are there again.
        hold.tokens = None
        return "swept" if self.settle(name, names, price) == "settled" else "refused"

    def confirm(
        self, said: dict[str, tuple[int, int]], receipts: list[tuple[str, tuple[str, ...]]]
    ) -> int:
        dropped = 0
        for name, names in dict(receipts).items():
            if name in self.outbox:
                self._owe(names, -self.outbox.pop(name)[0])
                dropped += 1
            if name in self.holds:
                self._hold(names, -self.holds.pop(name).nanos, -1)
        for name, (posted, version) in said.items():
            self._take(self.scopes[name], posted, version)
        return dropped

    def seed(self, name: str, posted: int, version: int, epoch: int) -> str:
        if self.epoch != epoch:
            return "epoch"
        self.scopes[name].epoch = epoch
        return "seeded" if self._take(self.scopes[name], posted, version) else "kept"

    def _take(self, scope: Scope, posted: int, version: int) -> bool:
        if scope.posted is not None and version <= scope.version:
            return False
        scope.posted, scope.version = posted, version
        return True

    def shard(self, epoch: int, to: str) -> str:
        if abs(self.epoch) > epoch:
            return "newer"
        if self.epoch == epoch:
            return "open"
        if to == "close":
            self.epoch = -epoch
            return "closed"
        if self.epoch != -epoch:
            return "lost"
        self.epoch = epoch
        return "open"
