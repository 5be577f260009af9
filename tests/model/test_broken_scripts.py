"""The machines find what they are made for: scripts that are broken on purpose."""

import pytest
from hypothesis import Phase, seed
from hypothesis.stateful import run_state_machine_as_test

from billing.till import Scripts
from billing.till_link import Script
from tests.model.roam import roam
from tests.model.test_money_machine import STEPS, bounds, staged
from tests.model.test_scripts_machine import linked

MACHINES = 400
SCRIPTS_MACHINES = 200
# Rare stories, looked for where there is one; all else is found among the first machines.
FIRST_SEEDS = {"sweep ends a request for free that was forwarded meanwhile": 100}
# These need more of a story before they show.
SLOW = {
    "a shard opens although it was emptied",
    "settle forgets the price of a hold that was lost",
}

# Script, what is taken out of it, what stands there instead.
BROKEN = {
    "confirm subtracts a price in place of taking over the balance": [
        (
            "confirm",
            "if price then redis.call('HINCRBY', key, 'uncommitted', 0 - price) end",
            "if price then redis.call('HINCRBY', key, 'uncommitted', 0 - price)"
            " redis.call('HINCRBY', key, 'posted', 0 - price) end",
        ),
        ("confirm", "'posted', posted, 'version', version", "'version', version"),
    ],
    "confirm takes over a balance that is older": [
        (
            "confirm",
            "if not current or tonumber(version) > tonumber(current) then",
            "if true then",
        ),
    ],
    "settle counts a price again": [
        (
            "settle",
            "if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then"
            " return {'exists', available()} end",
            "",
        ),
    ],
    "sweep ends a hold that was renewed meanwhile": [
        (
            "sweep",
            "if lease and tonumber(lease) + tonumber(ARGV[2]) > now then return 'leased' end",
            "",
        ),
    ],
    "sweep ends a request for free that was forwarded meanwhile": [
        ("sweep", "if f[2] ~= ARGV[3] then return 'changed' end", ""),
    ],
    "confirm leaves the hold of a lost settle": [
        ("confirm", "redis.call('HGET', KEYS[hold], 'nanos')", "false"),
    ],
    "admit goes by what an older epoch said": [
        ("admit", "if not f[2] or f[6] ~= epoch then", "if not f[2] then"),
    ],
    "settle forgets the price of a hold that was lost": [
        (
            "settle",
            "local price = tonumber(ARGV[2])",
            "local price = tonumber(ARGV[2])\n"
            "if redis.call('EXISTS', KEYS[2]) == 0 then return {'unknown', 0} end",
        ),
    ],
    "renew grows beyond the credit": [
        ("renew", "if available < more then", "if false then"),
    ],
    "a shard opens although it was emptied": [
        ("shard", "if current ~= 0 - epoch then return 'lost' end", ""),
    ],
}


# Found by the machine of the scripts alone, which knows budgets, too.
BROKEN_FOR_BUDGETS = {
    "admit takes a budget for a balance": [
        ("admit", "if kind == 'B' then available = limit - tonumber(f[2]) - spoken_for end", ""),
    ],
    "renew grows beyond a budget": [
        ("renew", "if kind == 'B' then available = limit - tonumber(f[1]) - spoken_for end", ""),
    ],
    "admit takes a hold that is more than is left": [
        ("admit", "if available < nanos then", "if available < nanos - 1 then"),
    ],
    "admit goes by what an older epoch said of a budget": [
        (
            "admit",
            "if not f[2] or f[6] ~= epoch then",
            "if not f[2] or kind == 'A' and f[6] ~= epoch then",
        ),
    ],
    "renew goes by what an older epoch said of a budget": [
        (
            "renew",
            "if not f[1] or f[4] ~= ARGV[1] then",
            "if not f[1] or kind == 'A' and f[4] ~= ARGV[1] then",
        ),
    ],
    "sweep keeps the hold of a budget": [
        ("sweep", "if ARGV[2 + i] ~= 'K' then", "if ARGV[2 + i] == 'A' then"),
    ],
    "seed takes over what a budget was before": [
        (
            "seed",
            "if newer >= 0 then return 'kept' end",
            "if newer >= 0 and ARGV[4] ~= '' then return 'kept' end",
        ),
    ],
    "settle keeps the hold of a budget": [
        (
            "settle",
            "redis.call('HINCRBY', KEYS[i], 'held', 0 - held_nanos)",
            "if ARGV[i] == 'A' then redis.call('HINCRBY', KEYS[i], 'held', 0 - held_nanos) end",
        ),
    ],
    "confirm takes the price from the first scope alone": [
        ("confirm", "string.gmatch(scopes, '%d+')", "string.gmatch(scopes, '^%d+')"),
    ],
    "admit holds for keys as if they had money": [
        (
            "admit",
            "if ARGV[7 + (i - 5) * 3] ~= 'K' then"
            " redis.call('HINCRBY', KEYS[i], 'held', ARGV[3]) end",
            "redis.call('HINCRBY', KEYS[i], 'held', ARGV[3])",
        ),
    ],
}


# And limits per minute.
BROKEN_FOR_RATES = {
    "admit takes nothing from limits per minute": [
        ("admit", "for _, write in ipairs(writes) do redis.call('HSET', unpack(write)) end", ""),
    ],
    "admit takes from a limit what it refuses": [
        (
            "admit",
            "if #write > 1 then writes[#writes + 1] = write end",
            "if #write > 1 then redis.call('HSET', unpack(write)) end",
        ),
    ],
    "admit never lets a request pass that wants more than there is": [
        ("admit", "math.min(wanted[j], limit)", "wanted[j]"),
    ],
    "settle puts the tokens of one scope right": [
        ("settle", "taken, i = taken or limit, i + 1", "taken, i = i == 3 and limit, i + 1"),
    ],
    "settle forgets the answer": [
        ("settle", "tonumber(string.match(ARGV[3], '\"output_tokens\":(%d+)') or '0')", "0"),
    ],
}
BROKEN_FOR_SCOPES = BROKEN_FOR_BUDGETS | BROKEN_FOR_RATES


def broken(changes: list[tuple[str, str, str]]) -> Scripts:
    scripts = Scripts()
    for name, old, new in changes:
        source = getattr(scripts, name).source
        assert source.count(old) == 1, old
        setattr(scripts, name, Script(name, source.replace(old, new)))
    return scripts


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.timeout(600)
def test_a_broken_script_is_found(
    fresh_book: str, fresh_till: str, is_full: bool, name: str
) -> None:
    if name in SLOW and not is_full:
        pytest.skip("takes a while; --full")
    first = FIRST_SEEDS.get(name, 0)
    with (
        staged(fresh_book, fresh_till, broken(BROKEN[name])) as kind,
        pytest.raises(AssertionError) as caught,
    ):
        roam(kind, range(first, first + MACHINES), STEPS)

    assert "/tests/model/" in str(caught.traceback[-1].path)


@pytest.mark.parametrize("name", BROKEN_FOR_SCOPES)
def test_a_script_that_is_broken_for_budgets_or_rates_is_found(fresh_till: str, name: str) -> None:
    """Some machine breaks a law; which is the smallest of them is nobody's business here."""
    small = bounds(SCRIPTS_MACHINES, phases=(Phase.generate,))
    with (
        linked(fresh_till, broken(BROKEN_FOR_SCOPES[name])) as kind,
        pytest.raises(AssertionError) as caught,
    ):
        run_state_machine_as_test(seed(1)(kind), settings=small)

    assert "/tests/model/" in str(caught.traceback[-1].path)
