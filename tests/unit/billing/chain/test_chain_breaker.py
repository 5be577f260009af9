"""How often a node is asked."""

from hypothesis import given
from hypothesis import strategies as st

from billing.chain.breaker import Breaker, Bucket


def test_a_burst_is_free_and_then_each_request_waits_its_turn():
    bucket = Bucket(per_second=10, burst=3, now_ms=1000)

    waits = [bucket.take(1000, 250) for _ in range(6)]
    assert waits == [0, 0, 0, 100, 200, None]
    assert bucket.take(1100, 250) == 200  # what was refused took nothing
    assert bucket.take(9000, 0) == 0


@given(
    st.integers(1, 50),
    st.integers(1, 20),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 500)), max_size=60),
)
def test_never_more_than_the_burst_and_the_rate(per_second, burst, tries):
    bucket, now_ms, made_at = Bucket(per_second, burst, 0), 0, []
    for later_ms, wait_max_ms in tries:
        now_ms += later_ms
        wait_ms = bucket.take(now_ms, wait_max_ms)
        if wait_ms is not None:
            assert wait_ms <= wait_max_ms
            made_at.append(now_ms + wait_ms)

    assert made_at == sorted(made_at)
    for at, moment_ms in enumerate(made_at):
        assert (at + 1) * 1000 <= burst * 1000 + moment_ms * per_second


def test_a_breaker_opens_after_failures_in_a_row_and_tries_again_by_itself():
    breaker = Breaker(failures_max=2, open_ms=100)

    assert [breaker.failed(0), breaker.lets_through(0)] == [False, True]
    breaker.succeeded()
    assert [breaker.failed(0), breaker.failed(0)] == [False, True]
    assert [breaker.lets_through(at) for at in (0, 99, 100, 101, 199)] == [
        False,
        False,
        True,
        False,
        False,
    ]
    # Whoever tried was cancelled and said nothing: one more may try.
    assert breaker.lets_through(200)
    assert not breaker.failed(200)  # it was open already
    assert not breaker.lets_through(299)
    assert breaker.lets_through(300)
    breaker.succeeded()
    assert [breaker.lets_through(301), breaker.is_open] == [True, False]


def test_a_node_that_asks_for_rest_gets_it_at_once():
    breaker = Breaker(failures_max=9, open_ms=100)

    assert breaker.trip(0)
    assert not breaker.lets_through(99)
    assert not breaker.trip(99)
    assert not breaker.lets_through(198)
