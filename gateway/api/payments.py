"""`/api/v1/payments`: what to send where, and what became of what was sent.

Nothing here gives credit: a hash that is submitted is a hint where to look. Credit goes to whoever
proved the wallet that a transfer came from.
Failure: BookUnavailable, and a till that does not count submissions, become 503; the same request
again does what is left to do.
"""

import logging
from typing import Any
from uuid import UUID

from litestar import Request, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath, JSONBody

from billing import payment_attempts
from billing.book import Connection
from billing.errors import IntentExpired, PaymentNotFound
from config.ids import id_text
from gateway.api.body import Body
from gateway.api.payment_shapes import (
    PREFIX,
    AttemptInFull,
    AttemptShown,
    IntentShown,
    IntentWish,
    SubmitWish,
    show_attempt,
    show_in_full,
    show_intent,
)
from gateway.api.policy import Policy, caller_of
from gateway.api.shapes import (
    PAGE_SIZE,
    Cursor,
    Page,
    PageSize,
    page_of,
    read_cursor,
    read_ref,
)
from gateway.api.tenant import tenant
from gateway.errors import ApiError
from gateway.services import Services

log = logging.getLogger("gateway.payments")

AnyRequest = Request[Any, Any, Any]
ROOT = "/api/v1/payments"
# Of an account.
INTENTS_PER_HOUR, SUBMISSIONS_PER_HOUR = 5, 10
HOUR_S = 3600


def handlers(services: Services) -> list[HTTPRouteHandler]:
    return [*_paying(services), *_reading(services)]


def _paying(services: Services) -> list[HTTPRouteHandler]:
    @post(ROOT + "/intents", policy=Policy.PAYMENTS, dto=Body[IntentWish], return_dto=None)
    async def create_intent(request: AnyRequest, data: JSONBody[IntentWish]) -> IntentShown:
        """Say how much you want to pay in; the answer says what to send where."""
        return await _create(services, caller_of(request).principal.account_id, data)

    @post(
        ROOT + "/attempts/{attempt_id:str}/submit",
        policy=Policy.PAYMENTS,
        status_code=200,
        dto=Body[SubmitWish],
        return_dto=None,
    )
    async def submit(
        request: AnyRequest, attempt_id: FromPath[str], data: JSONBody[SubmitWish]
    ) -> AttemptInFull:
        """Say which transaction pays; the same again changes nothing."""
        account_id = caller_of(request).principal.account_id
        return await _submit(services, account_id, _read_id(attempt_id), data.tx_hash.lower())

    return [create_intent, submit]


def _reading(services: Services) -> list[HTTPRouteHandler]:
    @get(ROOT + "/attempts", policy=Policy.PAYMENTS)
    async def list_attempts(
        request: AnyRequest, limit: PageSize = PAGE_SIZE, cursor: Cursor = ""
    ) -> Page[AttemptShown]:
        """The account's payment attempts, newest first."""
        account_id = caller_of(request).principal.account_id
        before = read_cursor(cursor, PREFIX)
        async with tenant(services, account_id) as conn:
            records = await payment_attempts.list_attempts(
                conn, account_id, limit + 1, before=before
            )
        chain = services.settings.chain
        return page_of(
            records, limit, PREFIX, lambda record: record.id, lambda r: show_attempt(r, chain)
        )

    @get(ROOT + "/attempts/{attempt_id:str}", policy=Policy.PAYMENTS)
    async def read(request: AnyRequest, attempt_id: FromPath[str]) -> AttemptInFull:
        """One payment attempt with what came for it."""
        account_id, uid = caller_of(request).principal.account_id, _read_id(attempt_id)
        async with tenant(services, account_id) as conn:
            return await _shown(services, conn, account_id, uid)

    return [list_attempts, read]


async def _create(services: Services, account_id: UUID, wish: IntentWish) -> IntentShown:
    terms = wish.read(services.settings.chain)
    await _count(services, "intent", account_id, INTENTS_PER_HOUR)
    async with tenant(services, account_id) as conn:
        attempt_id = await payment_attempts.create_intent(conn, account_id, terms)
        record = await payment_attempts.find_attempt(conn, account_id, attempt_id)
    facts = _facts(account_id, attempt_id)
    log.info("payment.intent_created", extra={**facts, "usd_cents": wish.amount_usd_cents})
    return show_intent(record, services.settings.chain)


async def _submit(
    services: Services, account_id: UUID, attempt_id: UUID, tx_hash: str
) -> AttemptInFull:
    async with tenant(services, account_id) as conn:
        record = await payment_attempts.find_attempt(conn, account_id, attempt_id)
        if record.tx_hash == tx_hash:
            return await _shown(services, conn, account_id, attempt_id)
    await _count(services, "submit", account_id, SUBMISSIONS_PER_HOUR)
    async with tenant(services, account_id) as conn:
        said = await payment_attempts.submit(conn, account_id, attempt_id, tx_hash)
        shown = await _shown(services, conn, account_id, attempt_id)
    facts = {**_facts(account_id, attempt_id), "tx_hash": tx_hash}
    if said == "expired":
        log.info("payment.expired", extra=facts)
        raise IntentExpired
    if said == "submitted":
        log.info("payment.submitted", extra=facts)
    return shown


async def _shown(
    services: Services, conn: Connection, account_id: UUID, attempt_id: UUID
) -> AttemptInFull:
    record = await payment_attempts.find_attempt(conn, account_id, attempt_id)
    transfers = await payment_attempts.transfers_of(conn, attempt_id)
    return show_in_full(record, transfers, services.settings.chain)


async def _count(services: Services, what: str, account_id: UUID, limit: int) -> None:
    """Raises ApiError 429; TillUnavailable when nobody counts."""
    name = f"payment:{what}:{id_text(account_id)}"
    may, wait_ms = await services.limiter.take(name, limit, HOUR_S)
    if not may:
        wait_s = -(-wait_ms // 1000)
        headers = ((b"retry-after", b"%d" % wait_s), (b"retry-after-ms", b"%d" % wait_ms))
        message = (
            f"An account may do this {limit} times an hour. Try again in {wait_s} seconds; what "
            "you sent to the treasury is credited all the same."
        )
        raise ApiError(429, "rate_limited", message, kind="rate_limit_error", headers=headers)


def _read_id(text: str) -> UUID:
    return read_ref(text, PREFIX, PaymentNotFound())


def _facts(account_id: UUID, attempt_id: UUID) -> dict[str, str]:
    return {
        "billing_account_id": f"acct_{id_text(account_id)}",
        "payment_attempt_id": PREFIX + id_text(attempt_id),
    }
