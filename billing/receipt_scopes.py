"""The scopes that a request was held on, found again from its receipt alone. Pure.

Sweeper, replay, rebuild and audit find the same ones as the worker did: a budget's window follows
from `started_at`, and whether there was a budget is on the receipt.
"""

from billing.receipts import ChargeReceipt
from billing.till_scopes import BudgetScope, SpendScopes, spend_scopes
from billing.windows import window_start


def budget_of(receipt: ChargeReceipt) -> BudgetScope | None:
    """The budget's window that the request was held on; without its limit."""
    if not receipt.budget_window:
        return None
    return BudgetScope(
        virtual_key_id=receipt.virtual_key_id,
        window=receipt.budget_window,
        starts_at=window_start(receipt.budget_window, receipt.started_at),
    )


def scopes_of(receipt: ChargeReceipt) -> SpendScopes:
    """All of them: the receipt names their owners."""
    key_id = receipt.app_key_id or receipt.virtual_key_id
    return spend_scopes(receipt.billing_account_id, key_id, budget=budget_of(receipt))
