"""The window of a budget that a worker holds on is the one that is found from the receipt."""

from datetime import UTC, datetime, timedelta, timezone
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.budget_windows import BudgetedScopes
from billing.receipt_scopes import scopes_of
from billing.receipts import ChargeReceipt, Provenance, decode_receipt, encode_receipt
from billing.till_scopes import BudgetScope, SpendScopes, spend_scopes
from billing.windows import BEGINNING, window_end, window_start
from keys.principal import WINDOWS, Window

ACCOUNT, KEY = uuid4(), uuid4()
MOMENTS = st.integers(946_684_800_000_000, 4_102_444_800_000_000).map(
    lambda micros: BEGINNING + timedelta(microseconds=micros)
)


def budgeted(window: Window) -> tuple[BudgetedScopes, list[SpendScopes]]:
    """The scopes of a key with a budget, and those that were made."""
    made: list[SpendScopes] = []

    def make(budget: BudgetScope) -> SpendScopes:
        made.append(spend_scopes(ACCOUNT, KEY, budget=budget))
        return made[-1]

    scope = BudgetScope(virtual_key_id=KEY, window=window, starts_at=BEGINNING, limit_nanos=7)
    return BudgetedScopes(scope, make), made


def receipt_of(window: Window, started_at: datetime) -> ChargeReceipt:
    receipt = ChargeReceipt(
        request_id=uuid4(),
        source_reference="r",
        billing_account_id=ACCOUNT,
        virtual_key_id=KEY,
        app_key_id=None,
        protocol="chat.completions",
        provider="p",
        requested_model="m",
        markup_bps=20_000,
        hold_nanos=0,
        provenance=Provenance.STREAM,
        started_at=started_at,
        finished_at=started_at,
        budget_window=window,
    )
    return decode_receipt(encode_receipt(receipt))


@given(st.sampled_from(WINDOWS), st.lists(MOMENTS, min_size=1, max_size=5))
def test_receipts_lead_to_the_scopes_that_were_held_on(
    window: Window, moments: list[datetime]
) -> None:
    scopes, _ = budgeted(window)
    for moment in moments:
        held_on = scopes.at(moment)

        assert scopes_of(receipt_of(window, moment)).scope_keys == held_on.scope_keys
        assert held_on.budget is not None
        assert held_on.budget.limit_nanos == 7


@given(st.sampled_from(WINDOWS), MOMENTS)
def test_a_moment_is_in_its_window(window: Window, moment: datetime) -> None:
    start = window_start(window, moment)
    end = window_end(window, start)

    assert start <= moment
    assert end is None or moment < end
    assert window_start(window, start) == start
    assert end is None or window_start(window, end) == end
    elsewhere = moment.astimezone(timezone(timedelta(hours=-11)))
    assert window_start(window, elsewhere) == start


@pytest.mark.parametrize("window", WINDOWS)
def test_the_scopes_of_a_window_are_made_once(window: Window) -> None:
    scopes, made = budgeted(window)
    monday = datetime(2027, 3, 1, tzinfo=UTC)  # and the first of a month
    for microseconds in (0, 1, 86_399_999_999):
        scopes.at(monday + timedelta(microseconds=microseconds))
    assert len(made) == 1
    scopes.at(monday - timedelta(microseconds=1))

    assert len(made) == (1 if window == "total" else 2)


def test_a_receipt_without_a_budget_has_two_scopes() -> None:
    receipt = receipt_of("day", BEGINNING)
    receipt.budget_window = ""

    assert scopes_of(receipt).kinds == ("A", "K")
