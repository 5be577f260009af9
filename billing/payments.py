"""Transfers on the chain become credit here, once, and are taken back when the chain loses them.

Each function is one transaction: transfer, ledger row, balance, attempt and events, or none of it.
All are safe to repeat, from anywhere and at once. Locks are taken in one order: transfer, sender,
account, attempt. The till is told afterwards, of the account that is returned.
Failure: BookUnavailable: nothing happened, or all of it; the same call again finds out.
"""

from itertools import pairwise
from typing import Any, Literal
from uuid import UUID

import msgspec

from billing.book import INSERT_LEDGER_ROW, Connection, read_account, translated
from billing.chain.transfer import Transfer, transfer_nanos
from billing.errors import (
    AccountUnknown,
    CreditTooLarge,
    TransferChanged,
    TransferNotInSuspense,
    TransferUnknown,
)
from billing.money import NANOS_MAX
from billing.payment_states import Status, Suspense, TransferState
from billing.payments_store import (
    AttemptEvent,
    Place,
    find_transfer,
    lock_sender,
    lock_transfer,
    move_transfer,
    note_attempt,
    note_transfer,
    put_transfer,
    suspense_of,
    transfer_key,
    transfer_of,
)
from billing.till_epoch import AccountState

# At one proof; what is beyond it is found by the next one.
CLAIMS_MAX = 200
# Whom we froze for a deposit that vanished, we thaw when it is back.
REVERSED_REASON = "A deposit was reversed by its chain, and its credit had been spent."

Outcome = Literal["credited", "known", "suspense", "reversed"]


class Settlement(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. account: what the till has to be told, also when nothing was new."""

    outcome: Outcome
    account: AccountState | None = None
    suspense_reason: str = ""


class Ruling(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided elsewhere of a transfer: that nobody gets it yet, or who does."""

    hold_back: Suspense | None = None
    account_id: UUID | None = None
    note: str = ""


async def credit_transfer(
    conn: Connection, transfer: Transfer, *, hold_back: Suspense | None = None
) -> Settlement:
    """Credit a transfer that is final enough to whoever proved its sender, once.

    Without such an account, or when there is a reason to hold it back, it goes to suspense. Raises
    TransferChanged when another sender or amount was credited under its key: reverse that first.
    """
    async with translated(), conn.transaction():
        return await _settle(conn, transfer, Ruling(hold_back=hold_back))


async def claim_for(
    conn: Connection, key: tuple[int, str, int], account_id: UUID, note: str
) -> Settlement:
    """Credit a transfer in suspense to an account that an operator names; again changes nothing.

    Raises TransferUnknown, TransferNotInSuspense, AccountUnknown, CreditTooLarge.
    """
    async with translated(), conn.transaction():
        await lock_transfer(conn, *key)
        row = await find_transfer(conn, *key)
        if row is None:
            raise TransferUnknown
        is_known = row["state"] == "credited" and row["billing_account_id"] == account_id
        is_anothers = row["billing_account_id"] not in (None, account_id)
        if (row["state"] != "suspense" and not is_known) or is_anothers:
            raise TransferNotInSuspense
        ruling = Ruling(account_id=account_id, note=note)
        settled = await _settle(conn, transfer_of(row), ruling)
        if settled.outcome == "suspense":
            raise CreditTooLarge
        return settled


async def claim_suspense(conn: Connection, address: str) -> list[Settlement]:
    """Credit everything in suspense that came from a wallet, now that somebody proved it.

    The wallet has to be committed. Each transfer is a transaction of its own: what is not reached
    is found by the next call.
    """
    assert not conn.is_in_transaction()
    sender = address.lower()
    async with translated(), conn.transaction():
        # Whoever puts something of this wallet into suspense right now is waited for.
        await lock_sender(conn, sender)
        waiting = await suspense_of(conn, sender, CLAIMS_MAX)
    return [await credit_transfer(conn, transfer) for transfer in waiting]


async def see_transfer(conn: Connection, transfer: Transfer) -> None:
    """Note a transfer that is not final enough. One that is there already only gets its block.

    Raises TransferChanged as credit_transfer does.
    """
    async with translated(), conn.transaction():
        await _lock(conn, transfer)
        row = await find_transfer(conn, transfer.chain_id, transfer.tx_hash, transfer.ordinal)
        if row is not None and row["state"] != "reversed":
            if row["state"] == "credited":
                _check_same(row, transfer)
            await move_transfer(conn, transfer)
            return
        generation = 0 if row is None else row["generation"]
        owner = await _owner(conn, transfer, row)
        place = Place(
            state=TransferState.SEEN,
            account_id=owner,
            attempt_id=_attempt_before(row, owner),
            generation=generation,
        )
        await put_transfer(conn, transfer, place)
        await note_transfer(conn, transfer, None if row is None else row["state"], place)


async def reverse_transfer(conn: Connection, key: tuple[int, str, int], reason: str) -> Settlement:
    """Take back what a transfer brought, once: the chain has it no longer.

    An account whose balance falls below zero is frozen. Raises TransferUnknown.
    """
    async with translated(), conn.transaction():
        await lock_transfer(conn, *key)
        row = await find_transfer(conn, *key)
        if row is None:
            raise TransferUnknown
        account_id = row["billing_account_id"]
        if row["state"] == "reversed":
            account = None if account_id is None else await read_account(conn, account_id)
            return Settlement(outcome="known", account=account)
        transfer, account = transfer_of(row), None
        metadata = {"reason": reason}
        if row["state"] == "credited":
            reference = ledger_reference(transfer, row["generation"] - 1)
            payee = await _lock_account(conn, account_id)
            account = await _post(conn, payee, -row["nanos"], reference)
            metadata["reference"] = reference
        place = Place(
            state=TransferState.REVERSED,
            account_id=account_id,
            attempt_id=row["payment_attempt_id"],
            generation=row["generation"],
        )
        await put_transfer(conn, transfer, place)
        await note_transfer(conn, transfer, row["state"], place, **metadata)
        return Settlement(outcome="reversed", account=account)


def ledger_reference(transfer: Transfer, generation: int) -> str:
    """What the ledger calls a credit: the transfer, and how often it was credited before."""
    key = transfer_key(transfer.chain_id, transfer.tx_hash, transfer.ordinal)
    return f"{key}:{generation}" if generation else key


async def _lock(conn: Connection, transfer: Transfer) -> None:
    await lock_transfer(conn, transfer.chain_id, transfer.tx_hash, transfer.ordinal)
    await lock_sender(conn, transfer.sender)


async def _settle(conn: Connection, transfer: Transfer, ruling: Ruling) -> Settlement:
    """The one way to CREDITED. In the caller's transaction."""
    await _lock(conn, transfer)
    row = await find_transfer(conn, transfer.chain_id, transfer.tx_hash, transfer.ordinal)
    if row is not None and row["state"] == "credited":
        return await _known(conn, transfer, row)
    owner = ruling.account_id or await _owner(conn, transfer, row)
    generation = 0 if row is None else row["generation"]
    before = None if row is None else row["state"]
    payee = None if owner is None else await _lock_account(conn, owner)
    why = _why_not(transfer, payee, ruling)
    if why is not None:
        place = Place(
            state=TransferState.SUSPENSE,
            suspense_reason=why,
            account_id=owner,
            attempt_id=_attempt_before(row, owner),
            generation=generation,
        )
        await put_transfer(conn, transfer, place)
        if before != "suspense" or row["suspense_reason"] != why:
            await note_transfer(conn, transfer, before, place)
        return Settlement(outcome="suspense", suspense_reason=why)
    assert payee is not None
    attempt_id, attempt = _attempt_before(row, owner), None
    if attempt_id is None and (attempt := await _find_attempt(conn, payee["id"], transfer)):
        attempt_id = attempt["id"]
    place = Place(
        state=TransferState.CREDITED,
        account_id=payee["id"],
        attempt_id=attempt_id,
        generation=generation + 1,
    )
    reference = ledger_reference(transfer, generation)
    account = await _post(conn, payee, transfer_nanos(transfer), reference)
    await put_transfer(conn, transfer, place)
    note = {"note": ruling.note} if ruling.note else {}
    await note_transfer(conn, transfer, before, place, reference=reference, **note)
    if attempt is not None:
        await _credit_attempt(conn, payee["id"], attempt, transfer)
    return Settlement(outcome="credited", account=account)


def _why_not(transfer: Transfer, payee: Any, ruling: Ruling) -> Suspense | None:
    """Why a transfer is credited to nobody now."""
    if ruling.hold_back is not None:
        return ruling.hold_back
    if payee is None:
        return Suspense.UNKNOWN_SENDER
    if payee["balance_nanos"] + transfer_nanos(transfer) > NANOS_MAX:
        return Suspense.TOO_LARGE
    return None


BIND_ATTEMPT = """
UPDATE chain_transfers
SET payment_attempt_id = $4
WHERE chain_id = $1 AND tx_hash = $2 AND ordinal = $3 AND payment_attempt_id IS NULL
"""


async def _known(conn: Connection, transfer: Transfer, row: Any) -> Settlement:
    """It was credited before. Its block, and an attempt that named it since, may be new."""
    _check_same(row, transfer)
    account_id = row["billing_account_id"]
    await move_transfer(conn, transfer)
    if row["payment_attempt_id"] is None:
        attempt = await _find_attempt(conn, account_id, transfer)
        if attempt is not None:
            key = (transfer.chain_id, transfer.tx_hash, transfer.ordinal)
            await conn.execute(BIND_ATTEMPT, *key, attempt["id"])
            await _credit_attempt(conn, account_id, attempt, transfer)
    return Settlement(outcome="known", account=await read_account(conn, account_id))


def _attempt_before(row: Any, owner: UUID | None) -> UUID | None:
    """The attempt that a transfer was credited for before it was reversed."""
    if row is None or owner is None or row["billing_account_id"] != owner:
        return None
    attempt_id = row["payment_attempt_id"]
    assert attempt_id is None or isinstance(attempt_id, UUID)
    return attempt_id


def _check_same(row: Any, transfer: Transfer) -> None:
    if (row["sender"], row["units"]) != (transfer.sender, transfer.units):
        raise TransferChanged


# By lower(): wallets are kept as they were signed.
SELECT_OWNER = """
SELECT a.id
FROM wallets AS w
JOIN billing_accounts AS a ON a.owner_user_id = w.user_id
WHERE lower(w.address) = $1
"""


async def _owner(conn: Connection, transfer: Transfer, row: Any) -> UUID | None:
    """Whose transfer it is: who got it before, else whoever proved its sender."""
    if row is not None and row["generation"] > 0 and row["sender"] == transfer.sender:
        owner = row["billing_account_id"]
    else:
        owner = await conn.fetchval(SELECT_OWNER, transfer.sender)
    assert owner is None or isinstance(owner, UUID)
    return owner


LOCK_PAYEE = """
SELECT id, balance_nanos, version, status, status_reason
FROM billing_accounts
WHERE id = $1
FOR UPDATE
"""


async def _lock_account(conn: Connection, account_id: UUID) -> Any:
    account = await conn.fetchrow(LOCK_PAYEE, account_id)
    if account is None:
        raise AccountUnknown
    return account


UPDATE_PAYEE = """
UPDATE billing_accounts
SET balance_nanos = $2,
    version = $3,
    status = $4,
    status_reason = $5,
    status_changed_at = CASE WHEN status = $4 THEN status_changed_at ELSE now() END
WHERE id = $1
"""


async def _post(conn: Connection, account: Any, nanos: int, reference: str) -> AccountState:
    """Append a deposit or a reversal to the ledger of an account that is locked."""
    before, seq = account["balance_nanos"], account["version"] + 1
    after = before + nanos
    reason = "deposit" if nanos > 0 else "reversal"
    row = (account["id"], seq, before, nanos, after, reason, reference, "{}")
    await conn.execute(INSERT_LEDGER_ROW, *row)
    status, why = account["status"], account["status_reason"]
    if nanos < 0 and after < 0 and status == "active":
        status, why = "frozen", REVERSED_REASON
    elif nanos > 0 and after >= 0 and status == "frozen" and why == REVERSED_REASON:
        status, why = "active", "The deposits of this account cover what it spent again."
    await conn.execute(UPDATE_PAYEE, account["id"], after, seq, status, why)
    return AccountState(account_id=account["id"], balance_nanos=after, version=seq, status=status)


# One that names the transaction comes first; else the oldest that asked for just this amount, while
# it was open: finality takes its time.
SELECT_ATTEMPT = """
SELECT a.id, a.status
FROM payment_attempts AS a
JOIN payment_intents AS i ON i.id = a.payment_intent_id
WHERE a.billing_account_id = $1 AND a.chain_id = $2
    AND ((a.tx_hash = $3 AND a.status IN ('PENDING_UNVERIFIED', 'CREDITED'))
         OR (a.status = 'CREATED_INTENT' AND i.units = $4
             AND $5 BETWEEN i.created_at - interval '2 minutes' AND i.expires_at))
ORDER BY a.tx_hash IS NULL, a.id
LIMIT 1
FOR UPDATE OF a
"""


async def _find_attempt(conn: Connection, account_id: UUID, transfer: Transfer) -> Any:
    """The account's attempt that a transfer is for, if it is for one."""
    return await conn.fetchrow(
        SELECT_ATTEMPT,
        account_id,
        transfer.chain_id,
        transfer.tx_hash,
        transfer.units,
        transfer.block_time,
    )


STEP_ATTEMPT = """
UPDATE payment_attempts
SET status = $3, ended_at = CASE WHEN $3 = 'CREDITED' THEN now() END
WHERE id = $1 AND status = $2
"""


async def _credit_attempt(
    conn: Connection, account_id: UUID, attempt: Any, transfer: Transfer
) -> None:
    """Both steps for one that nobody submitted; none for one that another transfer credited."""
    steps = {
        "CREATED_INTENT": (Status.CREATED_INTENT, Status.PENDING_UNVERIFIED, Status.CREDITED),
        "PENDING_UNVERIFIED": (Status.PENDING_UNVERIFIED, Status.CREDITED),
    }.get(attempt["status"], ())
    for before, after in pairwise(steps):
        moved = await conn.execute(STEP_ATTEMPT, attempt["id"], before, after)
        assert moved == "UPDATE 1"  # the row is locked
        event = AttemptEvent(
            event="STATUS_CHANGED",
            account_id=account_id,
            attempt_id=attempt["id"],
            tx_hash=transfer.tx_hash,
            before=before,
            after=after,
        )
        await note_attempt(conn, event, ordinal=transfer.ordinal)
