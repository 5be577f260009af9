"""`/api/v1/operator/payments`: money that waits for an owner, and saying who that is.

Every claim is in the log with its operator, and in the book with its note.
Failure: BookUnavailable becomes 503; a till that does not answer is only logged.
"""

import logging
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from litestar import Request, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import JSONBody
from msgspec import Meta

from billing import book
from billing.payment_states import TransferState
from billing.payments import claim_for
from billing.payments_store import list_transfers
from config.settings import INT_MAX
from gateway.api.body import Body
from gateway.api.operator_accounts import facts, read_account_id
from gateway.api.payment_shapes import TxHash
from gateway.api.policy import Policy, operator_of
from gateway.api.shapes import Line, Money, Note
from gateway.services import Services
from gateway.suspense import tell_till

log = logging.getLogger("gateway.operators")

AnyRequest = Request[Any, Any, Any]
ROOT = "/api/v1/operator/payments"
SHOWN_MAX = 500

Natural = Annotated[int, Meta(ge=0, le=INT_MAX)]


class ClaimWish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose a transfer in suspense is, and why."""

    chain_id: Natural
    tx_hash: TxHash
    ordinal: Natural
    account_id: Line
    note: Note


class WaitingTransfer(msgspec.Struct, frozen=True, kw_only=True):
    """A transfer that nobody was credited."""

    object: Literal["transfer"] = "transfer"
    chain_id: int
    tx_hash: str
    ordinal: int
    sender: str
    amount: Money
    suspense_reason: str
    block_number: int
    block_time: datetime
    seen_at: datetime


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """The last that came, at most 500."""

    object: Literal["list"] = "list"
    data: list[WaitingTransfer]


class Claimed(msgspec.Struct, frozen=True, kw_only=True):
    """Who got a transfer, and the balance after it."""

    object: Literal["claim"] = "claim"
    account_id: str
    balance: Money


def handlers(services: Services) -> list[HTTPRouteHandler]:
    @get(ROOT + "/suspense", policy=Policy.OPERATOR)
    async def suspense() -> Waiting:
        """Transfers that are credited to nobody, newest first."""
        async with book.acquire(services.pool) as conn:
            rows = await list_transfers(conn, TransferState.SUSPENSE, SHOWN_MAX)
        return Waiting(data=[_show(row) for row in rows])

    @post(
        ROOT + "/claim",
        policy=Policy.OPERATOR,
        status_code=200,
        dto=Body[ClaimWish],
        return_dto=None,
    )
    async def claim(request: AnyRequest, data: JSONBody[ClaimWish]) -> Claimed:
        """Credit a transfer in suspense to an account; again changes nothing."""
        return await _claim(services, operator_of(request), data)

    return [suspense, claim]


async def _claim(services: Services, operator_id: UUID, data: ClaimWish) -> Claimed:
    account_id = read_account_id(data.account_id)
    key = (data.chain_id, data.tx_hash.lower(), data.ordinal)
    async with book.acquire(services.pool) as conn:
        settled = await claim_for(conn, key, account_id, data.note)
    told = {**facts(operator_id, account_id), "tx_hash": key[1], "ordinal": data.ordinal}
    log.warning("payment.claimed", extra={**told, "outcome": settled.outcome})
    await tell_till(services, settled)
    assert settled.account is not None
    balance = Money.of(settled.account.balance_nanos)
    return Claimed(account_id=data.account_id, balance=balance)


def _show(row: dict[str, Any]) -> WaitingTransfer:
    return WaitingTransfer(
        amount=Money.of(row["nanos"]),
        **{name: row[name] for name in _SAME},
    )


_SAME = (
    *("chain_id", "tx_hash", "ordinal", "sender", "suspense_reason", "block_number"),
    *("block_time", "seen_at"),
)
