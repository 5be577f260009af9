"""Gates: `cpu_us_per_request>+10%` says when a run is not good enough. Pure.

`[load:]figure>value` fails when the figure is above a fixed value; with a sign the value is a
change against the older run, in the figure's unit or in percent.
"""

import re
from collections.abc import Sequence

import msgspec

from bench.report import Figures, Report
from bench.table import value_of

GATE = re.compile(
    r"(?:(?P<load>[a-z0-9-]+):)?(?P<figure>[a-z_0-9.]+)\s*(?P<sense>[<>])\s*"
    r"(?P<value>[+-]?\d+(?:\.\d+)?)(?P<percent>%?)"
)


class GateError(Exception):
    """A gate that cannot be read, or that no load of the run has a figure for."""


class Gate(msgspec.Struct, frozen=True):
    """When to fail."""

    text: str
    load: str
    figure: str
    is_above: bool
    value: float
    is_change: bool
    is_percent: bool


class Outcome(msgspec.Struct, frozen=True):
    """One gate at one load."""

    gate: str
    load: str
    before: float | None
    now: float
    limit: float
    is_missed: bool


def read_gate(text: str) -> Gate:
    """Raises GateError."""
    found = GATE.fullmatch(text.strip())
    if found is None:
        raise GateError(f"{text}: write it like 'cpu_us_per_request>+10%' or 'added_p99_ms>5'")
    value, percent = found["value"], bool(found["percent"])
    is_change = value[0] in "+-"
    if percent and not is_change:
        raise GateError(f"{text}: a percentage is a change and needs a sign")
    outer = found["figure"].partition(".")[0]
    if outer not in Figures.__struct_fields__:
        raise GateError(f"{text}: there is no figure '{outer}'")
    return Gate(
        text,
        found["load"] or "",
        found["figure"],
        found["sense"] == ">",
        float(value),
        is_change,
        percent,
    )


def judge(
    gates: Sequence[Gate], now: Report, before: Report | None = None, arm: str = "gateway"
) -> list[Outcome]:
    """Every gate at every load that both runs have. Raises GateError for a gate without one."""
    outcomes: list[Outcome] = []
    for gate in gates:
        if gate.is_change and before is None:
            raise GateError(f"{gate.text}: a change needs two runs, use bench compare")
        found = [
            outcome
            for one in now.figures
            if one.arm == arm and gate.load in {"", one.load}
            if (outcome := _judge(gate, one, before)) is not None
        ]
        if not found:
            raise GateError(f"{gate.text}: no load of the run has this figure for arm '{arm}'")
        outcomes += found
    return outcomes


def _judge(gate: Gate, one: Figures, before: Report | None) -> Outcome | None:
    now = value_of(one, gate.figure)
    other = before.find(one.load, one.arm) if before is not None else None
    old = value_of(other, gate.figure) if other is not None else None
    if now is None or (gate.is_change and old is None):
        return None
    limit = gate.value
    if gate.is_change:
        assert old is not None
        limit = old + (abs(old) * gate.value / 100 if gate.is_percent else gate.value)
    is_missed = now > limit if gate.is_above else now < limit
    return Outcome(gate.text, one.load, old, now, limit, is_missed)
