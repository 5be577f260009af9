"""The campaign's judgement finds what is wrong with money, and nothing where nothing is wrong."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.faults.clients import Answer, Served
from tests.faults.plan import Behaviour, Kind, Order, Plan
from tests.faults.points import POINTS
from tests.faults.strike import Struck
from tests.faults.verdict import CHECKPOINT_S, SLACK_S, Evidence, Verdict, judge, price

PROMPT, WORDS = 18, 10
FULL = price(PROMPT, WORDS)
DIED_AT = 100.0
# Written down for certain: of 20 words one less at two checkpoints and three other counts each,
# and one more for 16 of them.
SENT, CERTAIN = 24, 14
RECOVERED = price(PROMPT, CERTAIN)


def order(name: str) -> Order:
    return Order(
        name=name,
        prompt=f"prompt of {name}",
        model="quick",
        stream=True,
        wants_usage=True,
        behaviour=Behaviour.STAY,
        start_ms=0,
    )


def receipt(name: str, **changed: Any) -> dict[str, Any]:
    facts = {
        "client_request_id": name,
        "source_reference": f"id of {name}",
        "outcome": "complete",
        "usage_source": "provider",
        "input_tokens": PROMPT,
        "output_tokens": WORDS,
        "price_nanos": FULL,
        "hold_nanos": 10 * FULL,
        "overrun_nanos": 0,
    }
    return facts | changed


def evidence() -> Evidence:
    """Two requests: one was answered whole, one was recovered when its worker died."""
    whole, open_then = order("whole"), order("open")
    checkpoint = DIED_AT - CHECKPOINT_S - SLACK_S
    words = [(checkpoint - 0.5, 10), (checkpoint - 0.1, 20), (checkpoint + 0.1, SENT)]
    guess = {"outcome": "recovered", "usage_source": "checkpoint"}
    recovered = receipt("open", price_nanos=RECOVERED, **guess)
    plan = Plan(
        number=0,
        kind=Kind.WORKER_POINT,
        orders=[whole, open_then],
        later=[],
        repeats=[],
        credits=1,
        fault_ms=0,
        fault_for_ms=0,
        point=POINTS["stream.passed"],
    )
    paid = FULL + RECOVERED
    return Evidence(
        plan=plan,
        struck=Struck(stopped_at=DIED_AT),
        answers=[
            Answer(order=whole, status=200, words=WORDS, is_whole=True, cost_nanos=FULL),
            Answer(order=open_then, status=200, words=3),
        ],
        served={
            whole.prompt: Served(outcome="served", words=[(1.0, WORDS)]),
            open_then.prompt: Served(outcome="aborted", words=words),
        },
        prompt_tokens=PROMPT,
        receipts=[receipt("whole"), recovered],
        adjusted={},
        ledger_charged=paid,
        balance=10**6 - paid,
        till_available=10**6 - paid,
        audit_findings=[],
        trouble=[],
    )


def changed_receipt(seen: Evidence, index: int, **changed: Any) -> None:
    """The ledger agrees with it: what is wrong is the price alone."""
    receipts = [dict(row) for row in seen.receipts]
    before = receipts[index]["price_nanos"]
    receipts[index] |= changed
    seen.receipts = receipts
    seen.ledger_charged += receipts[index]["price_nanos"] - before


def free_whole(seen: Evidence) -> None:
    changed_receipt(seen, 0, price_nanos=0, outcome="voided")


def below_the_checkpoint(seen: Evidence) -> None:
    changed_receipt(seen, 1, price_nanos=price(PROMPT, CERTAIN - 1))


def free_recovered(seen: Evidence) -> None:
    changed_receipt(seen, 1, price_nanos=0)


def voided_though_forwarded(seen: Evidence) -> None:
    changed_receipt(seen, 1, price_nanos=0, outcome="voided")


def above_the_truth(seen: Evidence) -> None:
    changed_receipt(seen, 0, price_nanos=FULL + 1)


def above_the_hold(seen: Evidence) -> None:
    changed_receipt(seen, 0, hold_nanos=FULL - 1)


def unsent_but_charged(seen: Evidence) -> None:
    seen.served = {name: did for name, did in seen.served.items() if "whole" not in name}


def unsent_but_recovered_above_the_prompt(seen: Evidence) -> None:
    seen.served = {name: did for name, did in seen.served.items() if "open" not in name}


def failed_but_charged(seen: Evidence) -> None:
    seen.served = {name: replace(did, failed=True) for name, did in seen.served.items()}


def no_receipt(seen: Evidence) -> None:
    seen.ledger_charged -= seen.receipts[0]["price_nanos"]
    seen.receipts = seen.receipts[1:]


def two_receipts(seen: Evidence) -> None:
    seen.receipts = [*seen.receipts, receipt("whole", price_nanos=0, outcome="voided")]


def nobodys_receipt(seen: Evidence) -> None:
    seen.receipts = [*seen.receipts, receipt("stranger", price_nanos=0)]


def not_in_the_ledger(seen: Evidence) -> None:
    seen.ledger_charged -= 1


def twice_in_the_ledger(seen: Evidence) -> None:
    seen.ledger_charged += FULL


def adjusted_too_far(seen: Evidence) -> None:
    seen.adjusted = {"id of whole": 1}
    seen.ledger_charged += 1


def credit_from_nowhere(seen: Evidence) -> None:
    assert seen.till_available is not None
    seen.till_available += 1


def overdrawn(seen: Evidence) -> None:
    seen.balance = seen.till_available = -1


def done_twice(seen: Evidence) -> None:
    again = replace(order("again"), prompt="prompt of whole", repeats="whole")
    told = Answer(order=again, status=200, words=WORDS, is_whole=True, cost_nanos=FULL)
    seen.answers = [*seen.answers, told]
    seen.receipts = [*seen.receipts, receipt("again")]
    seen.ledger_charged += FULL


def sent_twice(seen: Evidence) -> None:
    seen.served = {name: replace(did, times=2) for name, did in seen.served.items()}


def told_another_price(seen: Evidence) -> None:
    seen.answers[0].cost_nanos = FULL - 1


def silence(seen: Evidence) -> None:
    seen.answers[1].trouble = "TimeoutError()"


def audit_finding(seen: Evidence) -> None:
    seen.audit_findings = ["audit L6: a hold"]


def test_what_adds_up_is_no_problem() -> None:
    verdict = judge(evidence())

    assert verdict.problems == []
    assert (verdict.lost, verdict.minted, verdict.overcharged) == (0, 0, 0)
    assert (verdict.requests, verdict.receipts, verdict.recovered) == (2, 2, 1)
    worst = {why: (loss.worst, loss.bound) for why, loss in verdict.losses.items()}
    at_stake = price(PROMPT, SENT) - RECOVERED
    assert sorted(worst.values()) == [(0, 0), (at_stake, at_stake)]


def test_a_free_call_may_be_tried_again_with_its_key() -> None:
    seen = evidence()
    again = replace(order("again"), prompt="prompt of refused", repeats="refused")
    first = replace(again, name="refused", repeats="")
    seen.answers = [*seen.answers, Answer(order=first), Answer(order=again, status=409)]
    free = {"price_nanos": 0, "outcome": "voided"}
    seen.receipts = [*seen.receipts, receipt("refused", **free), receipt("again", **free)]

    assert judge(seen).problems == []


def test_an_adjustment_counts_as_paid() -> None:
    seen = evidence()
    seen.adjusted = {"id of open": price(PROMPT, SENT) - RECOVERED}
    seen.ledger_charged += seen.adjusted["id of open"]

    assert judge(seen).problems == []


@pytest.mark.parametrize(
    ("spoil", "field", "nanos"),
    [
        (free_whole, "lost", FULL),
        (below_the_checkpoint, "lost", price(0, 1)),
        (free_recovered, "lost", RECOVERED),
        (voided_though_forwarded, "lost", RECOVERED),
        (no_receipt, "lost", FULL),
        (not_in_the_ledger, "lost", 1),
        (above_the_truth, "overcharged", 1),
        (unsent_but_charged, "overcharged", FULL),
        (unsent_but_recovered_above_the_prompt, "overcharged", price(0, CERTAIN)),
        (failed_but_charged, "overcharged", FULL + price(0, CERTAIN)),
        (twice_in_the_ledger, "overcharged", FULL),
        (adjusted_too_far, "overcharged", 1),
        (credit_from_nowhere, "minted", 1),
        (overdrawn, "minted", 1),
        (done_twice, "overcharged", FULL),
        (sent_twice, "lost", 0),
        (above_the_hold, "lost", 0),
        (two_receipts, "lost", 0),
        (nobodys_receipt, "lost", 0),
        (told_another_price, "lost", 0),
        (silence, "lost", 0),
        (audit_finding, "lost", 0),
    ],
)
def test_what_is_wrong_is_found_and_counted(
    spoil: Callable[[Evidence], None], field: str, nanos: int
) -> None:
    seen = evidence()
    spoil(seen)
    verdict = judge(seen)

    assert verdict.problems
    assert getattr(verdict, field) == nanos
    assert others(verdict, field) == 0


def others(verdict: Verdict, field: str) -> int:
    names = {"lost", "minted", "overcharged"} - {field}
    return sum(getattr(verdict, name) for name in names)
