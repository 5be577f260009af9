"""Calls packed in advance are what hiredis would have packed."""

from uuid import uuid4

import hiredis
from hypothesis import given
from hypothesis import strategies as st

from billing.till_scopes import ScopeLimits, spend_scopes
from billing.till_wire import Packed, words
from config.ids import id_text

SCOPES = spend_scopes(uuid4(), uuid4(), account=ScopeLimits(200), key=ScopeLimits(50))
NAMES = st.text(st.characters(codec="ascii"), max_size=40) | st.uuids().map(id_text)
NANOS = st.integers(0, 2**53 - 1)


def same(packed: Packed, *words: bytes | str | int) -> bool:
    whole = b"*%d\r\n%b" % (packed.count, packed.words)
    return whole == hiredis.pack_command(words)  # type: ignore[arg-type]


@given(NAMES, st.integers(1, 2**40), NANOS, st.binary(max_size=2000))
def test_an_admit(name: str, epoch: int, nanos: int, draft: bytes) -> None:
    packed = SCOPES.wire.admit(name, epoch, nanos, words((30_000, "w_1")).encode(), draft)
    keys = (SCOPES.epoch_key, SCOPES.outbox_key, SCOPES.hold_prefix + name, SCOPES.leases_key)
    limits = ("A", 200, 0, "K", 50, 0)

    args = (epoch, name, nanos, 30_000, "w_1", draft, *limits)
    assert same(packed, 6, *keys, *SCOPES.scope_keys, *args)


@given(NAMES, NANOS, st.binary(max_size=2000))
def test_a_settle(name: str, price: int, receipt: bytes) -> None:
    packed = SCOPES.wire.settle(name, price, receipt)
    keys = (SCOPES.outbox_key, SCOPES.hold_prefix + name, SCOPES.leases_key, *SCOPES.scope_keys)

    assert same(packed, 5, *keys, name, price, b"%d %b" % (price, receipt), "A", "K")


@given(NAMES)
def test_a_forwarded(name: str) -> None:
    assert same(SCOPES.wire.forwarded(name), 1, SCOPES.hold_prefix + name)
