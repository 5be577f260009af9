"""What can go wrong with money. Refusals say what the caller can do; the edge maps them to HTTP."""

from datetime import datetime
from typing import Literal
from uuid import UUID

from billing.standing import Standings


class BillingError(Exception):
    """Something went wrong with money."""

    def __init__(self) -> None:
        super().__init__(self.__doc__)


class Refusal(BillingError):
    """The request is refused before anything was charged."""


class InsufficientCredit(Refusal):
    """The account cannot pay for the most this request may cost."""

    def __init__(self, *, needed_nanos: int, available_nanos: int) -> None:
        super().__init__()
        self.needed_nanos = needed_nanos
        self.available_nanos = available_nanos


class KeyLimitReached(InsufficientCredit):
    """What the key may spend in this window of its budget does not pay for the most it may cost."""

    def __init__(
        self,
        *,
        needed_nanos: int,
        available_nanos: int,
        limit_nanos: int,
        resets_at: datetime | None,
    ) -> None:
        """resets_at: when the next window begins; None: never."""
        super().__init__(needed_nanos=needed_nanos, available_nanos=available_nanos)
        self.limit_nanos = limit_nanos
        self.resets_at = resets_at


class TooManyOpenRequests(Refusal):
    """The account or key has as many requests open as it may have."""

    def __init__(self, *, scope: str, limit: int) -> None:
        super().__init__()
        self.scope = scope
        self.limit = limit


class RateLimited(Refusal):
    """The account or key has used up its requests or tokens of this minute."""

    def __init__(
        self,
        *,
        scope: str,
        kind: Literal["requests", "tokens"],
        limit: int,
        retry_after_ms: int,
        standings: Standings,
    ) -> None:
        super().__init__()
        self.scope = scope
        self.kind = kind
        self.limit = limit
        self.retry_after_ms = retry_after_ms
        self.standings = standings


class AccountFrozen(Refusal):
    """The account is frozen."""


class KeyRevoked(Refusal):
    """The key was revoked."""


class TillUnavailable(BillingError):
    """The till did not answer in time; nothing may be admitted without it.

    What was asked may still have been done, unless it was not asked at all: there was no
    connection to ask on. Every script is safe to repeat.
    """

    def __init__(self, *, asked: bool = True) -> None:
        super().__init__()
        self.asked = asked


class TillRebuilding(TillUnavailable):
    """The till lost its content; open requests are placed in it again before anything new is."""

    def __init__(self) -> None:
        super().__init__(asked=False)


class TillRefused(BillingError):
    """The till answered with an error of its own."""

    def __init__(self, reply: str) -> None:
        super().__init__()
        self.reply = reply


class BookUnavailable(BillingError):
    """Postgres did not answer in time."""


class AccountUnknown(BillingError):
    """No such account."""


class CreditTooLarge(Refusal):
    """An account cannot hold that much: the till counts exactly up to $9,007,199.254740991."""


class ReferenceConflict(Refusal):
    """That reference was used before for another account or another amount."""


class IdempotencyMismatch(Refusal):
    """The idempotency key was used before with another body."""


class IdempotencyInFlight(Refusal):
    """The first request with this idempotency key has not ended yet."""


class IdempotencyCompleted(Refusal):
    """The first request with this idempotency key has ended; it is not done again."""

    def __init__(self, *, request_id: UUID, price_nanos: int) -> None:
        super().__init__()
        self.request_id = request_id
        self.price_nanos = price_nanos


class ReceiptsPending(BillingError):
    """Too many settled receipts wait for Postgres; no new request is admitted until they are in."""


class PaymentNotFound(Refusal):
    """No such payment attempt."""


class HashTaken(Refusal):
    """That transaction was submitted for another attempt."""


class AttemptClosed(Refusal):
    """This attempt has another transaction, or has ended."""


class IntentExpired(Refusal):
    """Nothing was submitted for this attempt before it expired."""


class TransferUnknown(BillingError):
    """No such transfer."""


class TransferNotInSuspense(Refusal):
    """The transfer does not wait for an owner, or has one."""


class TransferChanged(BillingError):
    """The chain has another sender or amount where a transfer was credited."""
