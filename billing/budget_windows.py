"""The scopes of a principal that has a budget, made anew with each window of it. Pure."""

from collections.abc import Callable
from datetime import UTC, datetime

from billing.till_scopes import BudgetScope, SpendScopes
from billing.windows import window_start


class BudgetedScopes:
    """`make` makes the scopes for a window; those of the last one that was asked for are kept."""

    __slots__ = ("_budget", "_ends_at", "_make", "_scopes", "_starts_at")

    def __init__(self, budget: BudgetScope, make: Callable[[BudgetScope], SpendScopes]) -> None:
        """budget: any window of it; only its owner, its kind of window and its limit count."""
        self._budget = budget
        self._make = make
        self._starts_at = self._ends_at = datetime.max.replace(tzinfo=UTC)
        self._scopes: SpendScopes | None = None

    def at(self, moment: datetime) -> SpendScopes:
        """For a request that began at that moment (its receipt's `started_at`)."""
        scopes = self._scopes
        if scopes is None or not self._starts_at <= moment < self._ends_at:
            scopes = self._scopes = self._scopes_of(moment)
        return scopes

    def _scopes_of(self, moment: datetime) -> SpendScopes:
        known = self._budget
        budget = BudgetScope(
            virtual_key_id=known.virtual_key_id,
            window=known.window,
            starts_at=window_start(known.window, moment),
            limit_nanos=known.limit_nanos,
        )
        self._starts_at = budget.starts_at
        self._ends_at = budget.ends_at or datetime.max.replace(tzinfo=UTC)
        return self._make(budget)
