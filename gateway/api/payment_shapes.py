"""Payments as they are asked for and shown over HTTP."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from billing.chain.transfer import NANOS_PER_UNIT
from billing.payment_attempts import AttemptRecord, Terms
from billing.payment_states import ClientState, client_state
from config.ids import id_text
from config.rules import token_address
from config.settings import Chain
from gateway.api.shapes import Money
from gateway.errors import ApiError

PREFIX = "pay_"
ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")
RETRY_AFTER_S = 60

UsdCents = Annotated[int, Meta(ge=100, le=1_000_000)]
# Written in any case, stored and compared in lower case only.
TxHash = Annotated[str, Meta(max_length=66, pattern=r"^0[xX][0-9a-fA-F]{64}$(?!\n)")]


class IntentWish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much somebody wants to pay in, in cents of USD."""

    amount_usd_cents: UsdCents

    def read(self, chain: Chain) -> Terms:
        """Raises ApiError 503 where nobody can pay in."""
        token = token_address(chain)
        # Nothing follows transactions yet: what is sent would be credited by nobody.
        if not chain.development:
            raise payments_unavailable()
        if not (ADDRESS.fullmatch(token) and ADDRESS.fullmatch(chain.treasury)):
            raise payments_unavailable()
        return Terms(
            chain_id=chain.id,
            token=token.lower(),
            treasury=chain.treasury.lower(),
            amount_usd_cents=self.amount_usd_cents,
        )


class SubmitWish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The hash of the transaction that pays."""

    tx_hash: TxHash


class IntentShown(msgspec.Struct, frozen=True, kw_only=True):
    """What to send where. The amount is in the token's smallest unit, as a string."""

    object: Literal["payment_intent"] = "payment_intent"
    attempt_id: str
    chain_id: int
    token: str
    to: str
    amount_raw: str
    amount_usd_cents: int
    expires_at: datetime
    link: str
    """For wallets (EIP-681)."""


class TransferShown(msgspec.Struct, frozen=True, kw_only=True):
    """A transfer that came for an attempt."""

    tx_hash: str
    ordinal: int
    sender: str
    amount_raw: str
    amount: Money
    state: Literal["seen", "suspense", "credited", "reversed"]


class AttemptShown(msgspec.Struct, frozen=True, kw_only=True):
    """A payment attempt and what became of it."""

    id: str
    object: Literal["payment_attempt"] = "payment_attempt"
    status: ClientState
    error_code: str | None
    """Why it failed; while it waits, what the last look at the chain said."""
    chain_id: int
    token: str
    to: str
    amount_raw: str
    amount_usd_cents: int
    credited: Money
    is_partial: bool
    """Something was credited, and less than was asked for."""
    tx_hash: str | None
    created_at: datetime
    expires_at: datetime
    submitted_at: datetime | None
    ended_at: datetime | None


class AttemptInFull(AttemptShown, frozen=True, kw_only=True):
    """A payment attempt with the transfers that came for it."""

    transfers: list[TransferShown]


def payments_unavailable() -> ApiError:
    """Nothing may be sent anywhere: there is no place for it."""
    message = "Nobody can pay in here: payments are for development chains with a treasury so far."
    headers = ((b"retry-after", b"%d" % RETRY_AFTER_S),)
    return ApiError(503, "payments_unavailable", message, kind="server_error", headers=headers)


def show_intent(record: AttemptRecord, chain: Chain) -> IntentShown:
    """Addresses as the config writes them, when they are still the same: with their checksum."""
    token, to = _as_written(record, chain)
    return IntentShown(
        attempt_id=PREFIX + id_text(record.id),
        chain_id=record.chain_id,
        token=token,
        to=to,
        amount_raw=str(record.units),
        amount_usd_cents=record.amount_usd_cents,
        expires_at=record.expires_at,
        # https://eips.ethereum.org/EIPS/eip-681
        link=f"ethereum:{token}@{record.chain_id}/transfer?address={to}&uint256={record.units}",
    )


def show_attempt(record: AttemptRecord, chain: Chain) -> AttemptShown:
    return AttemptShown(**_fields(record, chain))


def show_in_full(
    record: AttemptRecord, transfers: Sequence[Mapping[str, Any]], chain: Chain
) -> AttemptInFull:
    shown = [
        TransferShown(
            tx_hash=row["tx_hash"],
            ordinal=row["ordinal"],
            sender=row["sender"],
            amount_raw=str(row["units"]),
            amount=Money.of(row["nanos"]),
            state=row["state"],
        )
        for row in transfers
    ]
    return AttemptInFull(transfers=shown, **_fields(record, chain))


def _fields(record: AttemptRecord, chain: Chain) -> dict[str, Any]:
    token, to = _as_written(record, chain)
    return {
        "id": PREFIX + id_text(record.id),
        "status": client_state(record.status, record.credited_units),
        "error_code": record.error_code or (None if record.ended_at else record.checked_code),
        "chain_id": record.chain_id,
        "token": token,
        "to": to,
        "amount_raw": str(record.units),
        "amount_usd_cents": record.amount_usd_cents,
        "credited": Money.of(record.credited_units * NANOS_PER_UNIT),
        "is_partial": 0 < record.credited_units < record.units,
        "tx_hash": record.tx_hash,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "submitted_at": record.submitted_at,
        "ended_at": record.ended_at,
    }


def _as_written(record: AttemptRecord, chain: Chain) -> tuple[str, str]:
    written = {address.lower(): address for address in (token_address(chain), chain.treasury)}
    return written.get(record.token, record.token), written.get(record.treasury, record.treasury)
