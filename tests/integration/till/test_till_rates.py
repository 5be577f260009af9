"""Limits of requests and tokens per minute in `admit`, on the real server, by its own clock."""

import asyncio
from functools import partial
from itertools import pairwise
from typing import Any

import pytest

from billing.errors import InsufficientCredit, RateLimited, TooManyOpenRequests
from billing.receipts import encode_receipt
from billing.standing import Standing, Standings
from billing.till import Till
from billing.till_scopes import ScopeLimits, SpendScopes, spend_scopes
from config.ids import id_text, new_id
from tests.support.gateway import eventually
from tests.support.tills import Said, look, make_receipt, running_till

MINUTE = 60_000_000


def rated(
    scopes: SpendScopes, account: tuple[int, int] = (0, 0), key: tuple[int, int] = (0, 0)
) -> SpendScopes:
    """A new key of the same account, with limits of requests and tokens per minute."""
    return spend_scopes(
        scopes.account_id,
        new_id(),
        account=ScopeLimits(0, *account),
        key=ScopeLimits(0, *key),
    )


async def take(till: Till, scopes: SpendScopes, tokens: int = 0, name: str = "") -> Any:
    """Admit a request of one nano; how the limits stand."""
    return await till.admit(scopes, name or id_text(new_id()), 1, b"{}", tokens)


async def now_us(till: Till) -> int:
    seconds, rest = await till.link.command(("TIME",))
    return int(seconds) * 1_000_000 + int(rest)


async def passed(till: Till, due_us: int) -> bool | None:
    return True if await now_us(till) >= due_us else None


async def buckets(till: Till, scopes: SpendScopes) -> list[list[bytes | None]]:
    fields = ("rq", "rqf", "tk", "tkf")
    return [await till.link.command(("HMGET", key, *fields)) for key in scopes.scope_keys]


async def end(
    till: Till, scopes: SpendScopes, name: str, tokens: tuple[int, int], **more: Any
) -> bytes:
    receipt = make_receipt(scopes, 0, input_tokens=tokens[0], output_tokens=tokens[1], **more)
    (status, _) = await till.settle(scopes, name, 0, encode_receipt(receipt))
    assert isinstance(status, bytes)
    return status


@pytest.mark.parametrize(
    ("account", "key", "scope"), [((3, 0), (0, 0), "account"), ((9, 0), (3, 0), "key")]
)
async def test_a_minute_has_so_many_requests_and_no_more(
    till_url: str, account: tuple[int, int], key: tuple[int, int], scope: str
) -> None:
    said = Said()
    scopes = rated(said.account(1000), account, key)
    async with running_till(till_url, said) as till:
        seen = [await take(till, scopes) for _ in range(3)]
        before = await look(till_url, scopes), await buckets(till, scopes)
        with pytest.raises(RateLimited) as caught:
            await take(till, scopes)
        after = await look(till_url, scopes), await buckets(till, scopes)

    assert [each.requests.remaining for each in seen] == [2, 1, 0]
    assert [each.tokens for each in seen] == [None] * 3
    assert all(a.requests.full_in_ms < b.requests.full_in_ms for a, b in pairwise(seen))
    refusal = caught.value
    assert (refusal.scope, refusal.kind, refusal.limit) == (scope, "requests", 3)
    assert 0 < refusal.retry_after_ms <= 20_000
    assert refusal.standings.requests is not None
    assert refusal.standings.requests[:2] == (3, 0)
    assert before == after
    assert after[0].open == 3


@pytest.mark.parametrize("limit", [1, 7, 11])
async def test_a_limit_that_divides_no_minute_is_had_in_full(till_url: str, limit: int) -> None:
    said = Said()
    scopes = rated(said.account(1000), key=(limit, 0))
    async with running_till(till_url, said) as till:
        left = [(await take(till, scopes)).requests.remaining for _ in range(limit)]
        with pytest.raises(RateLimited):
            await take(till, scopes)

    assert left == list(range(limit))[::-1]


@pytest.mark.parametrize("limit", [7, 7001, 999_983, 2**26])
async def test_no_share_of_a_minute_is_rounded(till_url: str, limit: int) -> None:
    said = Said()
    scopes = rated(said.account(1000), key=(limit, limit))
    seen = []
    async with running_till(till_url, said) as till:
        await take(till, scopes)
        # Nearly empty: what comes next begins where the one before it ended.
        ahead = await now_us(till) + MINUTE - 6 * (MINUTE // limit) - 1_000_000
        key = scopes.scope_keys[1]
        await till.link.command(("HSET", key, "rq", ahead, "rqf", 1, "tk", ahead, "tkf", 1))
        for _ in range(4):
            await take(till, scopes, 1)
            seen.append([int(each or 0) for each in (await buckets(till, scopes))[1]])

    for (rq, rqf, tk, tkf), (rq2, rqf2, tk2, tkf2) in pairwise(seen):
        assert (rq2 - rq) * limit + rqf2 - rqf == MINUTE
        assert (tk2 - tk) * limit + tkf2 - tkf == MINUTE


async def test_a_bucket_refills_evenly_and_exactly(till_url: str) -> None:
    said = Said()
    scopes = rated(said.account(1000), account=(6000, 0))
    async with running_till(till_url, said) as till:
        await take(till, scopes)
        emptied_at = await now_us(till)
        await till.link.command(("HSET", scopes.scope_keys[0], "rq", emptied_at + MINUTE, "rqf", 0))
        admitted: list[Standings] = []
        waits: list[int] = []
        while len(admitted) < 20:
            try:
                admitted.append(await take(till, scopes))
            except RateLimited as exc:
                waits.append(exc.retry_after_ms)
        took = await now_us(till) - emptied_at
        full_at = int((await buckets(till, scopes))[0][0] or 0)

    # One each 10 ms, and not a microsecond earlier.
    assert took >= 20 * 10_000
    assert full_at == emptied_at + MINUTE + 20 * 10_000
    assert waits
    assert 0 < max(waits) <= 10


async def test_whoever_waits_as_long_as_told_is_admitted(till_url: str) -> None:
    said = Said()
    scopes = rated(said.account(1000), key=(600, 0))
    async with running_till(till_url, said) as till:
        await take(till, scopes)
        for _ in range(3):
            start = await now_us(till)
            await till.link.command(
                ("HSET", scopes.scope_keys[1], "rq", start + MINUTE, "rqf", 599)
            )
            with pytest.raises(RateLimited) as caught:
                await take(till, scopes)
            told_at = await now_us(till)
            due = told_at + caught.value.retry_after_ms * 1000
            await eventually(partial(passed, till, due))
            await take(till, scopes)

            assert 90 <= caught.value.retry_after_ms <= 101


async def test_two_workers_share_a_bucket_under_200_parallel_calls(till_url: str) -> None:
    said = Said()
    scopes = rated(said.account(1000), key=(7, 0))
    async with running_till(till_url, said) as one, running_till(till_url, said) as other:
        calls = [take(till, scopes) for _ in range(100) for till in (one, other)]
        answers = await asyncio.gather(*calls, return_exceptions=True)

    admitted = [answer for answer in answers if isinstance(answer, Standings)]
    assert len(admitted) == 7
    assert sum(isinstance(answer, RateLimited) for answer in answers) == 193
    seen = await look(till_url, scopes)
    assert (seen.held, seen.open, seen.key_open) == (7, 7, 7)
    seen.check()


async def test_200_parallel_calls_do_not_overshoot_tokens(till_url: str) -> None:
    said = Said()
    scopes = rated(said.account(1000), account=(0, 1000))
    async with running_till(till_url, said) as one, running_till(till_url, said) as other:
        calls = [take(till, scopes, 90) for _ in range(100) for till in (one, other)]
        answers = await asyncio.gather(*calls, return_exceptions=True)

    # Some tokens refill meanwhile, some 17 each second.
    assert len([a for a in answers if isinstance(a, Standings)]) == 11
    assert sum(isinstance(answer, RateLimited) for answer in answers) == 189


async def test_tokens_of_account_and_key_are_limited_each(till_url: str) -> None:
    said = Said()
    scopes = rated(said.account(1000), (0, 1000), (0, 700))
    async with running_till(till_url, said) as till:
        first = await take(till, scopes, 600)
        with pytest.raises(RateLimited) as key:
            await take(till, scopes, 200)
        other = rated(scopes, (0, 1000))
        with pytest.raises(RateLimited) as account:
            await take(till, other, 500)
        second = await take(till, other, 300)

    assert first.tokens[:2] == (700, 100)
    assert first.requests is None
    assert (key.value.scope, key.value.kind, key.value.limit) == ("key", "tokens", 700)
    assert 8000 < key.value.retry_after_ms <= 8572
    assert (account.value.scope, account.value.limit) == ("account", 1000)
    assert 100 <= second.tokens.remaining <= 140


async def test_requests_and_tokens_are_taken_together_or_not_at_all(till_url: str) -> None:
    said = Said()
    scopes = rated(said.account(1000), (2, 0), (0, 100))
    async with running_till(till_url, said) as till:
        seen = await take(till, scopes, 100)
        before = await buckets(till, scopes)
        with pytest.raises(RateLimited) as tokens:
            await take(till, scopes, 50)
        assert await buckets(till, scopes) == before

    assert (seen.requests[:2], seen.tokens[:2]) == ((2, 1), (100, 0))
    assert tokens.value.kind == "tokens"
    assert tokens.value.standings.requests is not None
    assert tokens.value.standings.requests.remaining == 1


async def test_more_tokens_than_the_limit_take_all_of_it(till_url: str) -> None:
    said = Said()
    scopes = rated(said.account(1000), key=(0, 100))
    async with running_till(till_url, said) as till:
        name = id_text(new_id())
        seen = await take(till, scopes, 10**12, name)
        with pytest.raises(RateLimited):
            await take(till, scopes, 5)
        assert await end(till, scopes, name, (30, 40)) == b"settled"
        again = await take(till, scopes, 30)

    assert seen.tokens[:2] == (100, 0)
    assert again.tokens.remaining <= 2


@pytest.mark.parametrize(
    ("taken", "used", "back_us"),
    [
        (600, (80, 20), 30_000_000),  # 500 tokens of 1,000 a minute
        (600, (600, 0), 0),
        (600, (500, 200), -6_000_000),
        (600, (0, 0), 36_000_000),  # voided: all of them
        (5000, (100, 100), 48_000_000),  # it took what there was: 1,000
    ],
)
async def test_a_settle_puts_the_tokens_right_once(
    till_url: str, taken: int, used: tuple[int, int], back_us: int
) -> None:
    said = Said()
    scopes = rated(said.account(1000), (0, 1000), (0, 1000))
    name = id_text(new_id())
    text = 'a "input_tokens":99999 b'  # escaped in the receipt
    async with running_till(till_url, said) as till:
        await take(till, scopes, taken, name)
        before = await buckets(till, scopes)
        settled = await end(till, scopes, name, used, served_model=text)
        after = await buckets(till, scopes)
        again = await end(till, scopes, name, used)
        assert await buckets(till, scopes) == after

    assert (settled, again) == (b"settled", b"exists")
    for old, new in zip(before, after, strict=True):
        assert int(old[2] or 0) - int(new[2] or 0) == back_us


async def test_a_request_that_used_far_more_empties_the_bucket_for_a_minute(till_url: str) -> None:
    said = Said()
    scopes = rated(said.account(1000), key=(0, 100))
    name = id_text(new_id())
    async with running_till(till_url, said) as till:
        await take(till, scopes, 10, name)
        await end(till, scopes, name, (2**40, 2**40))
        with pytest.raises(RateLimited) as caught:
            await take(till, scopes, 100)

    assert 59_000 < caught.value.retry_after_ms <= 60_000


async def test_the_settle_of_a_lost_hold_corrects_nothing(till_url: str) -> None:
    said = Said()
    scopes = rated(said.account(1000), key=(0, 100))
    async with running_till(till_url, said) as till:
        await take(till, scopes, 60)
        before = await buckets(till, scopes)
        assert await end(till, scopes, id_text(new_id()), (1, 1)) == b"unknown"
        assert await buckets(till, scopes) == before


async def test_the_same_request_takes_once_and_is_told_the_same(till_url: str) -> None:
    said = Said()
    scopes = rated(said.account(1000), (10, 0), (0, 100))
    name = id_text(new_id())
    async with running_till(till_url, said) as till:
        first = await take(till, scopes, 60, name)
        before = await buckets(till, scopes)
        again = await take(till, scopes, 60, name)
        assert await buckets(till, scopes) == before
        await end(till, scopes, name, (60, 0))
        settled = await take(till, scopes, 60, name)

    assert first == again
    assert first.requests[:2] == (10, 9)
    assert settled == Standings()


async def test_credit_comes_before_rates_and_rates_before_open_requests(till_url: str) -> None:
    said = Said()
    plain = said.account(10)
    limits = ScopeLimits(1, 1, 0)
    scopes = spend_scopes(plain.account_id, new_id(), key=limits)
    async with running_till(till_url, said) as till:
        await take(till, scopes)
        with pytest.raises(InsufficientCredit):
            await till.admit(scopes, id_text(new_id()), 10, b"{}")
        with pytest.raises(RateLimited):
            await take(till, scopes)
        await till.link.command(("HSET", scopes.scope_keys[1], "rq", 0))
        before = await buckets(till, scopes)
        with pytest.raises(TooManyOpenRequests):
            await take(till, scopes)
        assert await buckets(till, scopes) == before


async def test_the_tightest_scope_is_the_one_that_is_told(till_url: str) -> None:
    said = Said()
    scopes = rated(said.account(1000), (100, 50), (10, 5000))
    async with running_till(till_url, said) as till:
        seen = await take(till, scopes, 20)

    assert (seen.requests[:2], seen.tokens[:2]) == ((10, 9), (50, 30))


async def test_a_clock_that_went_back_locks_nobody_out(till_url: str) -> None:
    said = Said()
    scopes = rated(said.account(1000), key=(5, 50))
    async with running_till(till_url, said) as till:
        await take(till, scopes, 10)
        ahead = await now_us(till) + 3600 * 1_000_000
        await till.link.command(("HSET", scopes.scope_keys[1], "rq", ahead, "tk", ahead))
        seen = await take(till, scopes, 10)

    assert seen == Standings(Standing(5, 4, 12_000), Standing(50, 40, 12_000))


async def test_without_limits_nothing_is_kept_and_nothing_told(till_url: str) -> None:
    said = Said()
    scopes = said.account(1000)
    name = id_text(new_id())
    async with running_till(till_url, said) as till:
        assert await take(till, scopes, 0, name) is None
        assert await take(till, scopes, 0, name) is None
        assert await buckets(till, scopes) == [[None] * 4] * 2
        hold = await till.link.command(("HKEYS", scopes.hold_prefix + name))

    assert sorted(hold) == [b"draft", b"nanos", b"state", b"worker"]


async def test_limits_beyond_what_a_double_counts_are_limits(till_url: str) -> None:
    said = Said()
    most = 2**31 - 1
    scopes = rated(said.account(1000), (most, most), (most, most))
    async with running_till(till_url, said) as till:
        first = await take(till, scopes, most)
        with pytest.raises(RateLimited):
            await take(till, scopes, most)

    assert first.tokens.remaining == 0
    assert most - 2 <= first.requests.remaining < most
