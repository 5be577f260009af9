"""What an audit says: a check for each invariant with exact counts and some findings. Pure."""

from enum import StrEnum
from uuid import UUID

import msgspec

from config.ids import id_text

FINDINGS_SHOWN = 20
PREFIXES = {
    "request_id": "rcpt_",
    "billing_account_id": "acct_",
    "app_key_id": "key_",
    "virtual_key_id": "vkey_",
}


class Invariant(StrEnum):
    """The invariants by their numbers; docs and alerts use the same ones."""

    LEDGER = "L1 ledger gapless"
    """Seq without gaps, each balance from the one before, the last one the account's."""
    CHARGES = "L2 receipts and charges match"
    """A receipt with a price has exactly one ledger row, a charge has a receipt. What a sweeper
    guessed is corrected once at most, and to something within the hold. What a key spent on a day
    is the sum of its receipts."""
    MARGIN = "L3 price covers cost"
    """Except overrun, recovered and free calls, which are summed as notes."""
    PRICE = "L4 price recomputes"
    """Tokens, price version and markup give the stored amounts, within the hold."""
    DEPOSITS = "L5 deposits match the chain"
    """Every deposit is one transfer that was credited once."""
    TILL = "L6 till agrees"
    """Scopes are the sums of their holds and outbox, and never ahead of the book."""
    AGES = "L7 ages and shares"
    """Nothing waits for too long; few receipts rest on a guess."""
    KEYS = "L8 keys"
    """No plaintext key anywhere; a revoked key starts nothing."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is not as it must be."""

    what: str
    ids: dict[str, str]
    expected: str
    found: str
    nanos: int = 0
    """Drift: by how much two places disagree that say the same money."""


class Check(msgspec.Struct, kw_only=True):
    """One invariant: what was looked at and what was wrong. Violations and drift are of all."""

    invariant: Invariant
    checked: int = 0
    violations: int = 0
    drift_nanos: int = 0
    not_checked: str = ""
    findings: list[Finding] = []

    def add(
        self, what: str, expected: object, found: object, /, **ids: UUID | str | int | None
    ) -> None:
        """Count a violation, and keep it while there is room."""
        self.add_drift(0, what, expected, found, **ids)

    def add_drift(
        self,
        nanos: int,
        what: str,
        expected: object,
        found: object,
        /,
        **ids: UUID | str | int | None,
    ) -> None:
        """The same of a violation that is drift, by that much."""
        self.violations += 1
        self.drift_nanos += nanos
        if len(self.findings) < FINDINGS_SHOWN:
            shown = {name: _id(name, value) for name, value in ids.items() if value is not None}
            said = {"expected": str(expected), "found": str(found)}
            self.findings.append(Finding(what=what, ids=shown, nanos=nanos, **said))


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """Something allowed that an operator wants to see summed."""

    invariant: Invariant
    what: str
    count: int
    nanos: int | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole audit."""

    at_rest: bool
    checks: list[Check]
    notes: list[Note]

    @property
    def violations(self) -> int:
        return sum(check.violations for check in self.checks)

    @property
    def is_clean(self) -> bool:
        return self.violations == 0

    def violated(self) -> set[Invariant]:
        return {check.invariant for check in self.checks if check.violations}


class Draft:
    """A report while it is made."""

    def __init__(self) -> None:
        self.checks = {invariant: Check(invariant=invariant) for invariant in Invariant}
        self.notes: list[Note] = []

    def __getitem__(self, invariant: Invariant) -> Check:
        return self.checks[invariant]

    def note(self, invariant: Invariant, what: str, count: int, nanos: int | None = None) -> None:
        self.notes.append(Note(invariant=invariant, what=what, count=count, nanos=nanos))


def _id(name: str, value: UUID | str | int) -> str:
    return PREFIXES.get(name, "") + id_text(value) if isinstance(value, UUID) else str(value)
