"""The till's most frequent calls as bytes. What does not change for a principal is packed once.

hiredis.pack_command looks at every word of a command anew: 2 us for an `admit` that differs from
the last one in five of its 21 words. Pure.
"""

from collections.abc import Sequence

import msgspec

from billing.money import NANOS_MAX

# Characters of a request id; others are packed, too, but not from a template made before.
ID_LENGTH = 26


class Packed(msgspec.Struct, frozen=True):
    """What follows the script of an EVALSHA: the count of its words, and the words."""

    count: int
    words: bytes


class Renewal(msgspec.Struct, frozen=True, kw_only=True):
    """One open request as it stands now: absolute values."""

    request_id: str
    hold_nanos: int
    """What it is to hold; more than it does asks for growth."""
    is_forwarded: bool
    draft: bytes = b""
    """The receipt, should its worker die now; empty: as it was."""
    is_new: bool = False
    """Place the hold again when the till lost it, or the growth that was granted: hold_nanos is
    then no wish. The book must not have its receipt."""


class _Call(msgspec.Struct, frozen=True):
    """One script's words: those that stay, and gaps for what differs between two requests."""

    count: int
    before: str
    hold_prefix: str
    after_hold: str
    gaps: str
    last: str

    def template(self, id_length: int) -> bytes:
        hold = f"${len(self.hold_prefix) + id_length}\r\n{self.hold_prefix}%b\r\n"
        gaps = self.gaps.replace("ID", f"${id_length}\r\n%b\r\n")
        return f"{self.before}{hold}{self.after_hold}{gaps}{self.last}".encode("ascii")


# Epoch, id, nanos, lease and worker, draft; tokens, only where there are limits per minute;
# id, price, "<price> <receipt>".
_ADMIT_GAPS = "$%d\r\n%d\r\nID$%d\r\n%d\r\n%b$%d\r\n%b\r\n"
_TOKENS_GAP = "$%d\r\n%d\r\n"
_SETTLE_GAPS = "ID$%d\r\n%d\r\n$%d\r\n%d %b\r\n"


class ScopesWire:
    """The calls of one principal, whose keys are ASCII and have no percent sign in them."""

    __slots__ = (
        *("_admit", "_admit_template", "_hold_prefix", "_settle", "_settle_template"),
        *("counts_tokens", "is_rated"),
    )

    def __init__(
        self,
        *,
        shard_keys: tuple[str, str, str],
        hold_prefix: str,
        scope_keys: Sequence[str],
        kinds: Sequence[str],
        limits: Sequence[str | int],
        rates: Sequence[int] = (),
    ) -> None:
        """shard_keys: epoch, outbox, leases. limits: what `admit` wants of each scope.

        rates: of each scope the requests and tokens per minute, if any of them is limited.
        """
        self.is_rated = any(rates)
        """Whether there is any limit per minute."""
        self.counts_tokens = any(rates[1::2])
        """Whether `admit` is to be told how many tokens a request may take."""
        epoch_key, outbox_key, leases_key = shard_keys
        count, after_hold = len(scope_keys), words((leases_key, *scope_keys))
        self._hold_prefix = hold_prefix
        self._admit = _Call(
            1 + 4 + count + 6 + len(limits) + (1 + len(rates)) * self.is_rated,
            words((4 + count, epoch_key, outbox_key)),
            hold_prefix,
            after_hold,
            _ADMIT_GAPS,
            words(limits) + (_TOKENS_GAP + words(rates)) * self.is_rated,
        )
        self._settle = _Call(
            1 + 3 + count + 3 + len(kinds) + self.counts_tokens,
            words((3 + count, outbox_key)),
            hold_prefix,
            after_hold,
            _SETTLE_GAPS,
            words(kinds) + word("T") * self.counts_tokens,
        )
        self._admit_template = self._admit.template(ID_LENGTH)
        self._settle_template = self._settle.template(ID_LENGTH)

    def admit(
        self,
        request_id: str,
        epoch: int,
        hold: tuple[int, int],
        lease_and_worker: bytes,
        draft: bytes,
    ) -> Packed:
        """admit_v3.lua; hold: nanos and tokens; lease_and_worker are two words."""
        nanos, tokens = hold
        name = request_id.encode("ascii")
        size = len(name)
        template = self._admit_template if size == ID_LENGTH else self._admit.template(size)
        era, held, rest = len(str(epoch)), len(str(nanos)), len(draft)
        gaps: tuple[bytes | int, ...]
        gaps = (name, era, epoch, name, held, nanos, lease_and_worker, rest, draft)
        if self.is_rated:
            assert 0 <= tokens <= NANOS_MAX
            gaps += (len(str(tokens)), tokens)
        return Packed(self._admit.count, template % gaps)

    def settle(self, request_id: str, price_nanos: int, receipt: bytes) -> Packed:
        """settle_v2.lua"""
        name = request_id.encode("ascii")
        size, price_size = len(name), len(str(price_nanos))
        template = self._settle_template if size == ID_LENGTH else self._settle.template(size)
        entry_size = price_size + 1 + len(receipt)
        gaps = (name, name, price_size, price_nanos, entry_size, price_nanos, receipt)
        return Packed(self._settle.count, template % gaps)

    def forwarded(self, request_id: str) -> Packed:
        """forwarded_v1.lua"""
        return Packed(2, f"$1\r\n1\r\n{word(self._hold_prefix + request_id)}".encode())


def word(value: str | int) -> str:
    """One ASCII word of a command. https://valkey.io/topics/protocol/ (bulk strings)"""
    text = str(value)
    assert text.isascii()
    return f"${len(text)}\r\n{text}\r\n"


def words(values: Sequence[str | int]) -> str:
    return "".join(map(word, values))
