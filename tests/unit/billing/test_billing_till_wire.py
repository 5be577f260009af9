"""Calls packed in advance are what hiredis would have packed."""

from uuid import uuid4

import hiredis
from hypothesis import given
from hypothesis import strategies as st

from billing.till_scopes import ScopeLimits, spend_scopes
from billing.till_wire import Packed, words
from config.ids import id_text

SCOPES = spend_scopes(uuid4(), uuid4(), account=ScopeLimits(200), key=ScopeLimits(50))
RATED = spend_scopes(uuid4(), uuid4(), account=ScopeLimits(0, 600), key=ScopeLimits(5, 60, 9000))
NAMES = st.text(st.characters(codec="ascii"), max_size=40) | st.uuids().map(id_text)
NANOS = st.integers(0, 2**53 - 1)


def same(packed: Packed, *words: bytes | str | int) -> bool:
    whole = b"*%d\r\n%b" % (packed.count, packed.words)
    return whole == hiredis.pack_command(words)  # type: ignore[arg-type]


@given(NAMES, st.integers(1, 2**40), NANOS, st.binary(max_size=2000))
def test_an_admit(name: str, epoch: int, nanos: int, draft: bytes) -> None:
    packed = SCOPES.wire.admit(name, epoch, (nanos, 7), words((30_000, "w_1")).encode(), draft)
    keys = (SCOPES.epoch_key, SCOPES.outbox_key, SCOPES.hold_prefix + name, SCOPES.leases_key)
    limits = ("A", 200, 0, "K", 50, 0)

    args = (epoch, name, nanos, 30_000, "w_1", draft, *limits)
    assert same(packed, 6, *keys, *SCOPES.scope_keys, *args)


@given(NAMES, NANOS, st.integers(0, 10**9), st.binary(max_size=2000))
def test_an_admit_with_limits_per_minute(name: str, nanos: int, tokens: int, draft: bytes) -> None:
    packed = RATED.wire.admit(name, 1, (nanos, tokens), words((30_000, "w_1")).encode(), draft)
    keys = (RATED.epoch_key, RATED.outbox_key, RATED.hold_prefix + name, RATED.leases_key)
    rest = ("A", 0, 0, "K", 5, 0, tokens, 600, 0, 60, 9000)

    args = (1, name, nanos, 30_000, "w_1", draft, *rest)
    assert same(packed, 6, *keys, *RATED.scope_keys, *args)


def test_a_settle_is_marked_only_where_tokens_are_limited() -> None:
    requests_only = spend_scopes(uuid4(), uuid4(), key=ScopeLimits(0, 60)).wire
    keys = (RATED.outbox_key, f"{RATED.hold_prefix}r", RATED.leases_key, *RATED.scope_keys)

    assert same(RATED.wire.settle("r", 5, b"{}"), 5, *keys, "r", 5, b"5 {}", "A", "K", "T")
    assert (requests_only.is_rated, requests_only.counts_tokens) == (True, False)
    assert (SCOPES.wire.is_rated, SCOPES.wire.counts_tokens) == (False, False)


@given(NAMES, NANOS, st.binary(max_size=2000))
def test_a_settle(name: str, price: int, receipt: bytes) -> None:
    packed = SCOPES.wire.settle(name, price, receipt)
    keys = (SCOPES.outbox_key, SCOPES.hold_prefix + name, SCOPES.leases_key, *SCOPES.scope_keys)

    assert same(packed, 5, *keys, name, price, b"%d %b" % (price, receipt), "A", "K")


@given(NAMES)
def test_a_forwarded(name: str) -> None:
    assert same(SCOPES.wire.forwarded(name), 1, SCOPES.hold_prefix + name)
