"""The price of one receipt computed again, from nothing but the receipt and its price version.

Pure, and on purpose not the code that computed it first: a fault there would hide itself.
"""

from decimal import Decimal
from fractions import Fraction
from typing import Any

import msgspec

from billing.audit_report import Draft, Invariant

# Workers price by their own clocks; the book's clock says when a version came into force.
CLOCKS_APART_MS = 60_000
# Shares of guesses say something of many receipts, and nothing of a handful.
SHARE_RECEIPTS_MIN = 1000
COUNTED_PER_MILLE_MAX, RECOVERED_PER_MILLE_MAX = 5, 1


class Expected(msgspec.Struct, frozen=True):
    """What a receipt must say."""

    cost_nanos: int
    price_nanos: int
    overrun_nanos: int


class ReceiptAudit:
    """Looks at every receipt once: L3, L4, and the shares of L7."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._recent = self._counted = self._recovered = 0
        self._free = 0
        self._overrun, self._loss_overrun, self._loss_recovered = [0, 0], [0, 0], [0, 0]

    def look_at(self, row: Any) -> None:
        """One receipt joined with its price version."""
        self._check_price(row)
        self._check_margin(row)
        if row["is_recent"]:
            self._recent += 1
            self._counted += row["usage_source"] == "counted"
            self._recovered += row["outcome"] == "recovered"

    def finish(self) -> None:
        """Put the sums into the report."""
        note = self._draft.note
        note(Invariant.MARGIN, "cost beyond the hold, borne by the operator", *self._overrun)
        note(Invariant.MARGIN, "price below cost: overrun", *self._loss_overrun)
        note(Invariant.MARGIN, "price below cost: recovered", *self._loss_recovered)
        note(Invariant.MARGIN, "free: served without a price", self._free)
        check = self._draft[Invariant.AGES]
        check.checked += self._recent
        shares = (
            ("counted", self._counted, COUNTED_PER_MILLE_MAX),
            ("recovered", self._recovered, RECOVERED_PER_MILLE_MAX),
        )
        for name, count, most in shares:
            note(Invariant.AGES, f"{name} receipts of the last 7 days", count)
            if self._recent >= SHARE_RECEIPTS_MIN and count * 1000 > most * self._recent:
                found = f"{count} of {self._recent}"
                check.add(f"too many {name} receipts", f"at most {most} in 1000", found)

    def _check_margin(self, row: Any) -> None:
        check = self._draft[Invariant.MARGIN]
        check.checked += 1
        loss = row["provider_cost_nanos"] - row["price_nanos"]
        if row["overrun_nanos"] > 0:
            _count(self._overrun, row["overrun_nanos"])
        if row["cost_source"] == "none" and row["outcome"] != "voided":
            self._free += 1
        if loss <= 0:
            return
        if row["overrun_nanos"] > 0:
            _count(self._loss_overrun, loss)
        elif row["outcome"] == "recovered":
            _count(self._loss_recovered, loss)
        else:
            cost = row["provider_cost_nanos"]
            check.add("price below cost", f">= {cost}", row["price_nanos"], **_ids(row))

    def _check_price(self, row: Any) -> None:
        check = self._draft[Invariant.PRICE]
        check.checked += 1
        ids = _ids(row)
        if row["price_nanos"] > row["hold_nanos"]:
            check.add("price above the hold", f"<= {row['hold_nanos']}", row["price_nanos"], **ids)
        problem, expected = recompute(row)
        if problem:
            check.add("price cannot be recomputed", "a price version or a cost", problem, **ids)
        if expected is None:
            return
        for name in Expected.__struct_fields__:
            if row[name_of(name)] != getattr(expected, name):
                check.add(f"{name_of(name)} is not what it must be",
                          getattr(expected, name), row[name_of(name)], **ids)
