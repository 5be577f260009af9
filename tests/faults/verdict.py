"""Whether a run's money adds up, from what clients, provider, till and book say of it. Pure.

The truth of a request is what its provider did for it, priced by hand. A user pays at most that
and at most the hold; the operator loses at most what money.md's table of faults allows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.faults.clients import Answer, Served
from tests.faults.plan import RENEW_S, Kind, Plan
from tests.faults.strike import Struck

# Nanos a token, for the user: the campaign's prices times the markup of 2.
INPUT_NANOS, OUTPUT_NANOS = 2_000, 8_000
# A checkpoint is this old at most when a worker dies: a renewal falls due and waits for its turn.
CHECKPOINT_S = 2 * RENEW_S
# A slow machine may be this late with it.
SLACK_S = 0.5
WORDS_PER_COUNT = 6
# A request that may have reached its provider is never free.
NOT_FREE = 1

# Why the operator gets less than the provider may bill, and what the table of faults says of it.
WHOLE = "the client got all of it"
RECOVERED = "worker dead: since the last checkpoint"
ENDED = "client left, provider failed, hold used up"
ONE_PIECE = "worker dead: an answer in one piece, about to be settled"
STOOD_STILL = "worker stood still, then died: what it never read, too"
CUT_OFF = "worker dead while both stores were away: since the last checkpoint before"
UNSENT = "never reached the provider"
MARKED = "worker dead between its mark and the provider"
OVERDRAWN = "till lost holds: account overdrawn"


@dataclass(kw_only=True)
class Evidence:
    """All that is known of a run at rest."""

    plan: Plan
    struck: Struck
    answers: Sequence[Answer]
    served: Mapping[str, Served]
    prompt_tokens: int
    receipts: Sequence[Mapping[str, Any]]
    adjusted: Mapping[str, int]
    """Nanos charged or given back later, by request id."""
    ledger_charged: int
    balance: int
    """What is left of the account, or of the key's budget."""
    till_available: int | None
    """None: the till does not know of it."""
    audit_findings: Sequence[str]
    trouble: Sequence[str]
    """What went wrong while the run was done."""


@dataclass(kw_only=True)
class Loss:
    worst: int = 0
    bound: int = 0
    requests: int = 0

    def add(self, loss: int, bound: int) -> None:
        self.requests += 1
        if loss > self.worst:
            self.worst, self.bound = loss, bound


@dataclass(kw_only=True)
class Verdict:
    problems: list[str] = field(default_factory=list)
    receipts: int = 0
    recovered: int = 0
    requests: int = 0
    lost: int = 0
    minted: int = 0
    overcharged: int = 0
    uncertain: int = 0
    """Charged for prompts that were about to be sent when their worker died, but cost nothing."""
    losses: dict[str, Loss] = field(default_factory=dict)

    def loss(self, why: str, nanos: int, bound: int) -> None:
        self.losses.setdefault(why, Loss()).add(nanos, bound)


def judge(evidence: Evidence) -> Verdict:
    verdict = Verdict(problems=[*evidence.trouble, *evidence.audit_findings])
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for receipt in evidence.receipts:
        by_name.setdefault(receipt["client_request_id"], []).append(receipt)
    verdict.receipts = len(evidence.receipts)
    verdict.recovered = sum(r["outcome"] == "recovered" for r in evidence.receipts)
    again = {a.order.repeats: a for a in evidence.answers if a.order.repeats}
    for answer in evidence.answers:
        if answer.order.repeats:
            continue
        receipts = by_name.pop(answer.order.name, [])
        repeated = again.get(answer.order.name)
        if repeated is not None:
            receipts += by_name.pop(repeated.order.name, [])
            _judge_repetition(answer, repeated, receipts, verdict)
        judged = repeated if repeated is not None and repeated.is_whole else answer
        _judge_request(evidence, judged, receipts, verdict)
    for name in by_name:
        verdict.problems.append(f"receipt of a request that nobody sent: {name}")
    _judge_account(evidence, verdict)
    return verdict


def price(prompt_tokens: int, words: int) -> int:
    return prompt_tokens * INPUT_NANOS + words * OUTPUT_NANOS


def _judge_repetition(
    first: Answer, repeated: Answer, receipts: list[Mapping[str, Any]], verdict: Verdict
) -> None:
    """One key, one call: receipts keeps those that count."""
    verdict.requests += 1
    name = repeated.order.name
    if repeated.trouble:
        verdict.problems.append(f"{name}: the client saw {repeated.trouble}")
    # None at all: another worker died just then.
    if first.is_whole and repeated.status not in {0, 409}:
        verdict.problems.append(f"{name}: done before, and answered {repeated.status}")
    real = [receipt for receipt in receipts if receipt["outcome"] != "voided"]
    # A call that was free may be tried again; then each try has its own receipt.
    receipts[:] = real or receipts[:1]


def _judge_request(
    evidence: Evidence, answer: Answer, receipts: list[Mapping[str, Any]], verdict: Verdict
) -> None:
    name = answer.order.name
    verdict.requests += 1
    if answer.trouble:
        verdict.problems.append(f"{name}: the client saw {answer.trouble}")
    if len(receipts) > 1:
        verdict.problems.append(f"{name}: {len(receipts)} receipts")
    did = evidence.served.get(answer.order.prompt)
    if did is not None and did.times > 1:
        verdict.problems.append(f"{name}: sent to the provider {did.times} times")
    truth = _truth(evidence, did, receipts)
    if not receipts:
        if did is not None or answer.status == 200:
            verdict.problems.append(f"{name}: no receipt, status {answer.status}")
            verdict.lost += _floor(evidence, answer, did, None)
        return
    paid = sum(r["price_nanos"] + _adjusted(evidence, r) for r in receipts)
    receipt = receipts[0]
    if paid > truth or any(r["price_nanos"] > r["hold_nanos"] for r in receipts):
        verdict.overcharged += max(paid - truth, 0)
        verdict.problems.append(f"{name}: paid {paid}, true {truth}: {_short(receipt, answer)}")
    floor = _floor(evidence, answer, did, receipt)
    if paid < floor:
        verdict.lost += floor - paid
        verdict.problems.append(f"{name}: paid {paid}, due {floor}: {_short(receipt, answer)}")
    if answer.is_whole and answer.cost_nanos is not None and answer.cost_nanos != paid:
        verdict.problems.append(f"{name}: told {answer.cost_nanos}, paid {paid}")
    if did is None or did.failed:
        verdict.uncertain += paid
    verdict.loss(_why(evidence, answer, did, receipt), max(truth - paid, 0), max(truth - floor, 0))


def _truth(evidence: Evidence, did: Served | None, receipts: Sequence[Mapping[str, Any]]) -> int:
    """The price of what the provider did; of nothing when it never got the request."""
    if did is not None and not did.failed:
        return price(evidence.prompt_tokens, did.all_words)
    # Whoever recovers it knows only that it was about to be sent: the prompt may have cost.
    is_guess = any(receipt["outcome"] == "recovered" for receipt in receipts)
    return price(evidence.prompt_tokens, 0) if is_guess else 0


def _floor(
    evidence: Evidence, answer: Answer, did: Served | None, receipt: Mapping[str, Any] | None
) -> int:
    """The least that must be paid, by what is certain to have come through the gateway."""
    if did is None or did.failed:
        return 0
    if receipt is not None and _is_guess(evidence, receipt) and not answer.is_whole:
        due = _written_down(evidence, did)
        if receipt["outcome"] == "voided" and evidence.plan.stands_still:
            due = 0  # forwarded when its worker stood up again, which died before it could tell
    else:
        has_any = answer.words or answer.is_whole
        due = price(evidence.prompt_tokens, answer.words) if has_any else 0
    return due if receipt is None else min(due, receipt["hold_nanos"])


def _is_guess(evidence: Evidence, receipt: Mapping[str, Any]) -> bool:
    """A sweeper's, and no worker lived to correct it."""
    name = receipt["source_reference"]
    return receipt["usage_source"] == "checkpoint" and name not in evidence.adjusted


def _written_down(evidence: Evidence, did: Served) -> int:
    """The price of what the last checkpoint before a worker's end must have."""
    moment = evidence.struck.stopped_at - CHECKPOINT_S - SLACK_S
    words = did.words_at(moment)
    if not words:
        return NOT_FREE
    # Tokens may lie across the place where two counts meet: one for each count and one more for 16
    # of its own are left out. Counts are made for each checkpoint, and where a stream grows.
    first_at = next(at for at, count in did.words if count)
    meetings = int((moment - first_at) / RENEW_S) + 1 + words // WORDS_PER_COUNT
    return price(evidence.prompt_tokens, max(words - meetings - words // 16, 0))


def _why(evidence: Evidence, answer: Answer, did: Served | None, receipt: Mapping[str, Any]) -> str:
    if receipt["usage_source"] == "checkpoint" and receipt["outcome"] == "recovered":
        if did is None:
            return MARKED
        if evidence.plan.stands_still:
            return STOOD_STILL
        if evidence.plan.needs_patience:
            return CUT_OFF
        return RECOVERED if answer.order.stream else ONE_PIECE
    if did is None:
        return UNSENT
    is_all = receipt["outcome"] == "complete" and receipt["overrun_nanos"] == 0
    return WHOLE if answer.is_whole and is_all else ENDED


def _judge_account(evidence: Evidence, verdict: Verdict) -> None:
    charged = sum(r["price_nanos"] + _adjusted(evidence, r) for r in evidence.receipts)
    if charged != evidence.ledger_charged:
        verdict.problems.append(f"ledger {evidence.ledger_charged}, receipts {charged}")
        verdict.lost += max(charged - evidence.ledger_charged, 0)
        verdict.overcharged += max(evidence.ledger_charged - charged, 0)
    available = evidence.till_available
    if available is not None and available != evidence.balance:
        verdict.problems.append(f"till {available}, book {evidence.balance}")
        verdict.minted += max(available - evidence.balance, 0)
    overdrawn = max(-evidence.balance, 0)
    if evidence.plan.kind in LOSES_HOLDS:
        verdict.loss(OVERDRAWN, overdrawn, sum(r["hold_nanos"] for r in evidence.receipts))
    elif overdrawn:
        verdict.problems.append(f"overdrawn by {overdrawn}")
        verdict.minted += overdrawn


# Until a live worker has registered its holds again, an emptied till may admit more.
LOSES_HOLDS = {Kind.TILL_FLUSHED, Kind.TILL_ROLLED_BACK, Kind.TILL_KILLED}


def _adjusted(evidence: Evidence, receipt: Mapping[str, Any]) -> int:
    return evidence.adjusted.get(receipt["source_reference"], 0)


def _short(receipt: Mapping[str, Any], answer: Answer) -> str:
    facts = ("outcome", "usage_source", "input_tokens", "output_tokens", "price_nanos")
    said = ", ".join(f"{name} {receipt[name]}" for name in facts)
    order = answer.order
    client = f"{order.model}, {order.behaviour}, status {answer.status}, {answer.words} words"
    return f"{said}; {client}{', whole' if answer.is_whole else ''}"
