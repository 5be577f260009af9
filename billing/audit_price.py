"""The price of one receipt computed again, from nothing but the receipt and its price version.

Pure, and on purpose not the code that computed it first: a fault there would hide itself.
"""

from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec

from billing.audit_report import Draft, Invariant

# Workers price by their own clocks; the book's clock says when a version came into force.
CLOCKS_APART = timedelta(minutes=1)
# Shares of guesses say something of many receipts, and nothing of a handful.
SHARE_RECEIPTS_MIN, GUESSES_MIN = 1000, 10
COUNTED_PER_MILLE_MAX, RECOVERED_PER_MILLE_MAX = 5, 1
BPS = 10**4
# Kinds inside the input tokens, then those inside the output tokens.
KINDS = (
    *("cached_tokens", "cache_write_tokens", "audio_input_tokens"),
    *("reasoning_tokens", "audio_output_tokens"),
)


class Expected(msgspec.Struct, frozen=True):
    """What a receipt must say, in nanos."""

    cost: int
    price: int
    overrun: int


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
        self._check_guess(row)
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
            enough = self._recent >= SHARE_RECEIPTS_MIN and count >= GUESSES_MIN
            if enough and count * 1000 > most * self._recent:
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

    def _check_guess(self, row: Any) -> None:
        """What a sweeper ended says so in both fields, and was priced by tokens or not at all."""
        check, ids = self._draft[Invariant.PRICE], _ids(row)
        outcome, source = row["outcome"], row["usage_source"]
        is_guess = source == "checkpoint"
        if is_guess and outcome not in {"recovered", "voided"}:
            check.add("outcome of a checkpoint", "recovered or voided", outcome, **ids)
        if outcome == "recovered" and not is_guess:
            check.add("usage of a recovered receipt", "checkpoint", source, **ids)
        if is_guess and row["cost_source"] == "provider":
            check.add("cost of a checkpoint", "by the price book, or none", "the provider's", **ids)
        if is_guess and outcome == "voided" and (row["input_tokens"] or row["output_tokens"]):
            found = row["input_tokens"] + row["output_tokens"]
            check.add("tokens of a voided checkpoint", 0, found, **ids)

    def _check_price(self, row: Any) -> None:
        check = self._draft[Invariant.PRICE]
        check.checked += 1
        ids = _ids(row)
        if row["price_nanos"] > row["hold_nanos"]:
            check.add("price above the hold", f"<= {row['hold_nanos']}", row["price_nanos"], **ids)
        try:
            expected = recompute(row)
        except Unpriceable as exc:
            check.add(exc.what, exc.expected, exc.found, **ids)
            return
        if row["provider_cost_nanos"] != expected.cost:
            check.add("cost", expected.cost, row["provider_cost_nanos"], **ids)
        if row["price_nanos"] != expected.price:
            check.add("price", expected.price, row["price_nanos"], **ids)
        if row["overrun_nanos"] != expected.overrun:
            check.add("overrun", expected.overrun, row["overrun_nanos"], **ids)


class Unpriceable(Exception):
    """What the receipt says cannot have a price."""

    def __init__(self, what: str, expected: object, found: object) -> None:
        super().__init__(what)
        self.what = what
        self.expected = expected
        self.found = found


def recompute(row: Any) -> Expected:
    """Cost, price and overrun of a receipt, in nanos. Raises Unpriceable."""
    markup = row["markup_bps"]
    if markup < BPS:
        raise Unpriceable("markup below 1", f">= {BPS}", markup)
    if row["cost_source"] == "none":
        return Expected(0, 0, 0)
    if row["cost_source"] == "provider":
        numerator, denominator = _reported(row["reported_cost_usd"])
        nano = 10**9
    else:
        # Rates are nanos per million tokens.
        numerator, denominator = _by_the_book(row), 10**6
        nano = 1
    cost = _up(numerator * nano, denominator)
    full = _up(numerator * nano * markup, denominator * BPS)
    price = min(full, row["hold_nanos"])
    return Expected(cost, price, full - price)


def _reported(usd: Decimal | None) -> tuple[int, int]:
    if usd is None or not usd.is_finite() or usd < 0:
        raise Unpriceable("reported cost", "an amount of USD", usd)
    return usd.as_integer_ratio()


def _by_the_book(row: Any) -> int:
    """Nanos times a million. L4: the kinds are inside their totals, and billed once."""
    if row["model"] is None:
        raise Unpriceable("price version", "one of the price book", row["price_version"])
    if row["model"] != row["requested_model"]:
        raise Unpriceable("price version of another model", row["requested_model"], row["model"])
    if row["effective_from"] > row["posted_at"] + CLOCKS_APART:
        raise Unpriceable("price version of later", row["posted_at"], row["effective_from"])
    counts = [row[name] for name in KINDS]
    kinds_in, kinds_out = sum(counts[:3]), sum(counts[3:])
    plain_in, plain_out = row["input_tokens"] - kinds_in, row["output_tokens"] - kinds_out
    if min(plain_in, plain_out, *counts) < 0:
        raise Unpriceable("token counts", "kinds within totals", [plain_in, plain_out, *counts])
    input_rate, output_rate = row["input_rate"], row["output_rate"]
    # A model that does not sell audio apart bills it as any other token.
    audio_in = input_rate if row["audio_input_rate"] is None else row["audio_input_rate"]
    audio_out = output_rate if row["audio_output_rate"] is None else row["audio_output_rate"]
    rates = (
        *(row["cached_input_rate"], row["cache_write_rate"], audio_in),
        *(row["reasoning_rate"], audio_out),
    )
    total: int = plain_in * input_rate + plain_out * output_rate
    total += sum(count * rate for count, rate in zip(counts, rates, strict=True))
    return total


def _up(numerator: int, denominator: int) -> int:
    whole, rest = divmod(numerator, denominator)
    return whole + (rest > 0)


def _count(total: list[int], nanos: int) -> None:
    total[0] += 1
    total[1] += nanos


def _ids(row: Any) -> dict[str, UUID]:
    return {
        "request_id": row["request_id"],
        "billing_account_id": row["billing_account_id"],
    }
