"""What came from a wallet before anybody proved it is credited when somebody does.

Failure: none for the caller, who signs in all the same: it is logged, and the next sign-in, or the
next look at the chain, finds what is left.
"""

import logging

from billing import book
from billing.errors import BillingError
from billing.payments import Settlement, claim_suspense
from billing.payments_tell import tell_settlement
from config.ids import id_text
from gateway.services import Services

log = logging.getLogger("gateway.payments")


async def credit_waiting(services: Services, address: str) -> None:
    """Credit what waits for the prover of a wallet."""
    try:
        async with book.acquire(services.pool) as conn:
            settled = await claim_suspense(conn, address)
    except BillingError as exc:
        log.warning("payment.claim_failed", extra={"error": repr(exc)})
        return
    for settlement in settled:
        if settlement.outcome == "credited":
            await tell_till(services, settlement)


async def tell_till(services: Services, settlement: Settlement) -> None:
    """Log a settlement that is in the book, and let its credit be spent."""
    account = settlement.account
    if account is None:
        return
    facts = {
        "billing_account_id": f"acct_{id_text(account.account_id)}",
        "outcome": settlement.outcome,
        "balance_nanos": account.balance_nanos,
    }
    log.info("payment.settled", extra=facts)
    try:
        await tell_settlement(services.till, settlement)
    except BillingError as exc:
        # It asks the book before it refuses anybody for want of credit.
        log.warning("account.till_untold", extra={**facts, "error": repr(exc)})
