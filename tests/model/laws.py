"""What must hold after every step, and what must hold when everything came to rest."""

from typing import Any
from uuid import UUID

from billing.receipts import decode_receipt
from billing.till_scopes import account_scope_key
from billing.usage import UsageSource
from tests.model.people import Purse, Request, Worker
from tests.model.seen import Look
from tests.model.world import GRACE_S, Ledger, World


def check_sums(world: World, seen: Look) -> None:
    """Per scope held is the sum of its holds, uncommitted of its outbox; nothing is negative."""
    held: dict[str, int] = {}
    uncommitted: dict[str, int] = {}
    opened: dict[str, int] = {}
    for name, hold in seen.holds.items():
        purse = world.requests[name].purse
        for key in purse.money_keys:
            held[key] = held.get(key, 0) + hold.nanos
        for key in purse.scopes.scope_keys:
            opened[key] = opened.get(key, 0) + 1
    for name, (price, _) in seen.outbox.items():
        for key in world.requests[name].purse.money_keys:
            uncommitted[key] = uncommitted.get(key, 0) + price
    for key in {*seen.scopes, *opened, *uncommitted}:
        scope = seen.scopes.get(key, {})
        assert scope.get("held", 0) == held.get(key, 0), key
        assert scope.get("uncommitted", 0) == uncommitted.get(key, 0), key
        assert scope.get("open", 0) == opened.get(key, 0), key
    assert not set(seen.holds) & set(seen.outbox)
    assert set(seen.holds) == set(seen.leases)


def check_versions(world: World, seen: Look, ledger: Ledger) -> None:
    """What the till says was posted is what the book said at that version; never ahead of it."""
    for account_id in world.account_ids:
        scope = seen.scopes.get(account_scope_key(account_id), {})
        version = scope.get("version")
        if version is None:
            assert "posted" not in scope
            continue
        assert version <= ledger.balances[account_id][1]
        assert scope.get("posted") == ledger.posted_at(account_id, version)
    for key, purse in _budgets(world).items():
        scope = seen.scopes.get(key, {})
        version = scope.get("version")
        if version is None:
            assert "posted" not in scope
            continue
        assert version <= ledger.spent.get(purse.key_id, (0, 0))[1]
        assert scope.get("posted") == ledger.spent_at(purse.key_id, version)


def check_no_steps_back(world: World, before: Look, seen: Look, ledger: Ledger) -> None:
    """Without a loss no version goes back, and no hold is swept too early or too cheap."""
    for key, scope in before.scopes.items():
        assert seen.scopes.get(key, {}).get("version", 0) >= scope.get("version", 0), key
    for name in set(before.holds) - set(seen.holds) - world.guessed:
        guess = guess_of(world.requests[name], seen, ledger)
        if guess is not None:
            assert before.leases[name] + GRACE_S * 1000 <= seen.now_ms, name
            hold = before.holds[name]
            assert guess > 0 or hold.state == "H" or not hold.nanos, name


def check_nothing_minted(world: World, seen: Look, ledger: Ledger) -> None:
    """In a till that is open nobody can spend what somebody may still be charged.

    available <= balance - (what requests that are not in the book may still cost)
                 + (what the till lost and their workers did not place again yet)
                 + (what a worker that was taken for dead may charge above the guess)
    Of a budget the balance is what is left of it.
    """
    slack, owed = slack_and_owed(world, seen, ledger)
    for key, purse in _money(world).items():
        epoch = _epoch_of(seen, purse.scopes.epoch_key)
        if epoch <= world.lost_epoch or seen.scope_epochs.get(key) != str(epoch):
            continue  # closed for new holds
        scope = seen.scopes[key]
        posted = scope["posted"] if _is_account(key) else (purse.limit or 0) - scope["posted"]
        available = posted - scope.get("uncommitted", 0) - scope.get("held", 0)
        assert available <= _left(key, purse, ledger) - owed.get(key, 0) + slack.get(key, 0), key


def check_no_overspend(world: World, seen: Look, ledger: Ledger) -> None:
    """What may still be charged is there, except for what losses and sweepers' guesses explain.

    balance - (what requests that are not in the book may still cost) >= 0
                 - (what was open when the till lost something)
                 - (what workers that were taken for dead charge, or may, above the guess)
    """
    slack, owed = slack_and_owed(world, seen, ledger)
    for key, purse in _money(world).items():
        late = sum(
            max(-row["amount_nanos"], 0)
            for row in ledger.rows
            if row["reason"] == "adjust" and _is_of(row, key, purse)
        )
        explained = late + slack.get(key, 0) + world.at_risk.get(key, 0)
        assert _left(key, purse, ledger) - owed.get(key, 0) + explained >= 0, key


def _is_account(key: str) -> bool:
    return "}:a:" in key


def _budgets(world: World) -> dict[str, Purse]:
    """The keys of all budgets, and whose they are."""
    return {purse.money_keys[1]: purse for purse in world.purses if purse.limit is not None}


def _money(world: World) -> dict[str, Purse]:
    """The keys of all scopes that count money, and a purse of each."""
    return {key: purse for purse in world.purses for key in purse.money_keys}


def _is_of(row: Any, key: str, purse: Purse) -> bool:
    """Whether a row of the ledger is of that scope."""
    if _is_account(key):
        return bool(row["billing_account_id"] == purse.account_id)
    return bool(row["virtual_key_id"] == purse.key_id)


def _left(key: str, purse: Purse, ledger: Ledger) -> int:
    """What the book says may be spent."""
    if _is_account(key):
        return ledger.balances[purse.account_id][0]
    return (purse.limit or 0) - ledger.spent.get(purse.key_id, (0, 0))[0]


def slack_and_owed(
    world: World, seen: Look, ledger: Ledger
) -> tuple[dict[str, int], dict[str, int]]:
    """Per scope: what the till need not know, and what may still be charged."""
    slack: dict[str, int] = {}
    owed: dict[str, int] = {}
    for request in world.requests.values():
        if request.is_lost:
            continue
        guess = guess_of(request, seen, ledger)
        for key in request.purse.money_keys:
            more = None
            if guess is not None and not _heard_of_adjustment(request, key, seen, ledger):
                more = max(request.liability - guess, 0)
            if request.uid not in ledger.receipts:
                owed[key] = owed.get(key, 0) + request.liability
                if request.id in world.excused and more is None:
                    more = request.liability
            slack[key] = slack.get(key, 0) + (more or 0)
    return slack, owed


def _heard_of_adjustment(request: Request, key: str, seen: Look, ledger: Ledger) -> bool:
    """Whether the till knows that the worker's own receipt came after a sweeper's guess."""
    version = seen.scopes.get(key, {}).get("version", 0)
    rows = [row for row in ledger.rows if _is_of(row, key, request.purse)]
    for at, row in enumerate(rows, 1):
        if row["reason"] == "adjust" and row["reference"] == str(request.uid):
            return bool(version >= at)
    return False


def guess_of(request: Request, seen: Look, ledger: Ledger) -> int | None:
    """What a sweeper put in for a request."""
    posted = ledger.receipts.get(request.uid)
    if posted is not None:
        return posted[0] if posted[1] == UsageSource.CHECKPOINT else None
    if request.id in seen.outbox and _is_guess(seen.outbox[request.id][1]):
        return seen.outbox[request.id][0]
    return None


def is_represented(request: Request, seen: Look, ledger: Ledger) -> bool:
    """Whether the till keeps back what this request may cost, or need not."""
    if request.uid in ledger.receipts or request.is_lost:
        return True
    if request.id in seen.outbox:
        price, raw = seen.outbox[request.id]
        return _is_guess(raw) or price >= request.liability
    hold = seen.holds.get(request.id)
    return hold is not None and hold.nanos >= request.liability


def check_placed_again(worker: Worker, world: World, seen: Look, ledger: Ledger) -> None:
    """A worker that began to work with an epoch, and lost no message, has all its own in it."""
    names = {*worker.requests, *(receipt.source_reference for receipt in worker.unposted)}
    for name in names:
        assert is_represented(world.requests[name], seen, ledger), name


def check_rest(world: World, seen: Look, ledger: Ledger) -> None:
    """Nothing is open and nothing waits; every request has one receipt and its right price."""
    assert (seen.holds, seen.outbox, seen.leases) == ({}, {}, {})
    for key, scope in seen.scopes.items():
        left = {scope.get(name, 0) for name in ("held", "uncommitted", "open")}
        assert left == {0}, key
    totals: dict[str, int] = {}
    sums: dict[UUID, int] = {}
    last: dict[UUID, tuple[int, int]] = {}
    for row in ledger.rows:
        account_id, amount = row["billing_account_id"], row["amount_nanos"]
        seq, before = last.get(account_id, (0, 0))
        assert (row["seq"], row["balance_after_nanos"]) == (seq + 1, before + amount)
        last[account_id] = (row["seq"], row["balance_after_nanos"])
        sums[account_id] = sums.get(account_id, 0) + amount
        if row["reason"] != "grant":
            totals[row["reference"]] = totals.get(row["reference"], 0) - amount
    for account_id in world.account_ids:
        balance, version = ledger.balances[account_id]
        assert sums[account_id] == balance
        scope = seen.scopes[account_scope_key(account_id)]
        assert (scope["posted"], scope["version"]) == (balance, version)
    for key, purse in _budgets(world).items():
        spent = ledger.spent.get(purse.key_id, (0, 0))
        rows = [row["amount_nanos"] for row in ledger.rows if row["virtual_key_id"] == purse.key_id]
        assert spent == (-sum(rows), len(rows))
        assert (seen.scopes[key]["posted"], seen.scopes[key]["version"]) == spent
    known = {str(world.requests[name].uid): name for name in world.requests}
    assert set(totals) <= set(known)
    for uid, name in known.items():
        request = world.requests[name]
        assert 0 <= totals.get(uid, 0) <= request.asked, name
        if not request.is_lost:
            assert totals.get(uid, 0) == _price(request, ledger), name


def _price(request: Request, ledger: Ledger) -> int:
    """What a request costs whose worker lived until it had told the book, too."""
    assert request.price is not None
    _, source, hold = ledger.receipts[request.uid]
    # A sweeper that had found a smaller hold ended it: no more than that is charged.
    return min(request.price, hold) if source == UsageSource.CHECKPOINT else request.price


def _epoch_of(seen: Look, epoch_key: str) -> int:
    raw = seen.epochs[int(epoch_key[5:7], 16)]
    return int(raw) if raw and raw.isdigit() else 0


def _is_guess(raw: bytes) -> bool:
    return decode_receipt(raw).usage_source is UsageSource.CHECKPOINT
