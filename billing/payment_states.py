"""The states of payments and what may follow what. Pure."""

from enum import StrEnum
from typing import Literal


class Status(StrEnum):
    """Of an attempt."""

    CREATED_INTENT = "CREATED_INTENT"
    """Nobody said anything of a transaction yet."""
    PENDING_UNVERIFIED = "PENDING_UNVERIFIED"
    """A hash was submitted, or the transfer was found; it is not credited yet."""
    CREDITED = "CREDITED"
    """At least one transfer was credited for it."""
    REJECTED = "REJECTED"
    """The transaction is not what it has to be."""
    FAILED = "FAILED"
    """Nothing came of it."""


class Code(StrEnum):
    """What is wrong with an attempt, or keeps it waiting."""

    TX_NOT_FOUND = "TX_NOT_FOUND"
    TX_REVERTED = "TX_REVERTED"
    TOKEN_TRANSFER_NOT_FOUND = "TOKEN_TRANSFER_NOT_FOUND"  # noqa: S105 - no secret
    SENDER_MISMATCH = "SENDER_MISMATCH"
    RECIPIENT_MISMATCH = "RECIPIENT_MISMATCH"
    AMOUNT_MISMATCH = "AMOUNT_MISMATCH"
    INSUFFICIENT_CONFIRMATIONS = "INSUFFICIENT_CONFIRMATIONS"
    RECEIPT_NOT_FOUND = "RECEIPT_NOT_FOUND"
    INTENT_EXPIRED = "INTENT_EXPIRED"
    RPC_ERROR = "RPC_ERROR"


class TransferState(StrEnum):
    """Of a transfer on the chain."""

    SEEN = "seen"
    """It is there, and not yet deep enough."""
    SUSPENSE = "suspense"
    """It is deep enough, and nobody can be credited."""
    CREDITED = "credited"
    REVERSED = "reversed"
    """The chain has it no longer; what was credited was taken back."""


class Suspense(StrEnum):
    """Why a transfer is credited to nobody."""

    UNKNOWN_SENDER = "unknown_sender"
    """Nobody proved the wallet that it came from."""
    MINTED = "minted"
    FROM_TREASURY = "from_treasury"
    FROM_SWEEP = "from_sweep"
    """From an address of the operator's own."""
    TOO_LARGE = "too_large"
    """It would lift the account above what the till counts exactly."""
    HELD_BACK = "held_back"
    """An operator has to look at it."""


ClientState = Literal["PENDING_VERIFICATION", "CONFIRMED", "FAILED"]

ENDED = frozenset({Status.CREDITED, Status.REJECTED, Status.FAILED})
# The only steps there are; the book refuses all others, too (guard_attempt of migration 0006).
STEPS = frozenset(
    {
        (Status.CREATED_INTENT, Status.PENDING_UNVERIFIED),
        (Status.CREATED_INTENT, Status.FAILED),
        (Status.PENDING_UNVERIFIED, Status.CREDITED),
        (Status.PENDING_UNVERIFIED, Status.REJECTED),
        (Status.PENDING_UNVERIFIED, Status.FAILED),
    }
)
# What only says that a node lags or is away: it never ends an attempt.
RETRY_LATER = frozenset({Code.TX_NOT_FOUND, Code.INSUFFICIENT_CONFIRMATIONS, Code.RPC_ERROR})
# Of Status.FAILED; every other code that ends an attempt means Status.REJECTED.
FAILURES = frozenset({Code.TX_REVERTED, Code.RECEIPT_NOT_FOUND, Code.INTENT_EXPIRED})


def end_of(code: Code) -> Status:
    """How an attempt ends for a reason. Never for one that a lagging node gives."""
    assert code not in RETRY_LATER
    return Status.FAILED if code in FAILURES else Status.REJECTED


def client_state(status: str, credited_units: int) -> ClientState:
    """What clients see. Money that the chain lost again is not confirmed: it may come back."""
    if status in (Status.REJECTED, Status.FAILED):
        return "FAILED"
    if status == Status.CREDITED and credited_units > 0:
        return "CONFIRMED"
    return "PENDING_VERIFICATION"
