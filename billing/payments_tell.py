"""What the till has to be told after a payment was settled: credit to spend, or a frozen account.

Failure: TillUnavailable or TillRefused; the book has it, and the till asks the book before it
refuses anybody for want of credit.
"""

from billing.payments import Settlement
from billing.till import Till
from billing.till_tell import tell_account_status


async def tell_settlement(till: Till, settlement: Settlement) -> None:
    """Idempotent. After the commit, also for what is known: whoever settled it may have died."""
    account = settlement.account
    if account is None:
        return
    await till.seed_from_book(account.account_id)
    if account.status == "frozen":
        # A reading of the book that others share may be older than the freeze.
        await tell_account_status(till.link, account.account_id, "frozen")
