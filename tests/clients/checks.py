"""What a client must have seen: pure, from one report to the failures of each case."""

from typing import Any

Case = dict[str, Any]
CASES = (
    "complete",
    "stream",
    "stream_usage",
    "models",
    "bad_key",
    "unknown_model",
    "unknown_model_stream",
)
UNKNOWN_KEY_CODES = {"invalid_api_key", "key_malformed"}


def failures_of(cases: dict[str, Case], *, plain: bool) -> dict[str, list[str]]:
    """The failed cases with their reasons; plain leaves out what only Farebox adds."""
    found = {}
    for name in CASES:
        if name not in cases:
            found[name] = ["the client did not run it"]
            continue
        reasons = _reasons(name, cases[name], plain)
        if reasons:
            found[name] = reasons
    return found


def _reasons(name: str, case: Case, plain: bool) -> list[str]:
    if name == "models":
        return [] if case["listed"] else [f"the model is not among {case['count']} listed"]
    if name in {"bad_key", "unknown_model", "unknown_model_stream"}:
        return _error(name, case, plain)
    reasons = _answer(case)
    if name == "stream":
        if case["usage"] is not None:
            reasons.append(f"usage that nobody asked for: {case['usage']}")
    else:
        reasons += _usage(case["usage"] or {})
        reasons += [] if plain else _cost(case)
    if not plain and not str(case["header_receipt_id"]).startswith("rcpt_"):
        reasons.append(f"x-receipt-id is {case['header_receipt_id']!r}")
    return reasons


def _answer(case: Case) -> list[str]:
    return _unmet(
        ("no text", bool(case["text"])),
        (f"finish_reason {case['finish']!r}", case["finish"] in {"stop", "length"}),
        ("no x-request-id", bool(case["header_request_id"])),
        ("a stream in one chunk", case.get("chunks", 2) > 1),
    )


def _usage(usage: Case) -> list[str]:
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not (_count(prompt) and _count(completion)):
        return [f"usage {usage}"]
    if usage.get("total_tokens") != prompt + completion:
        return [f"total_tokens is not the sum in {usage}"]
    return []


def _cost(case: Case) -> list[str]:
    cost, receipt = case["cost"], case["receipt_id"]
    number = isinstance(cost, int | float) and not isinstance(cost, bool)
    return _unmet(
        (f"usage.cost {cost!r} is no number of dollars", number and cost >= 0),
        (f"usage.receipt_id is {receipt!r}", str(receipt).startswith("rcpt_")),
        ("x-receipt-id differs from usage.receipt_id", receipt == case["header_receipt_id"]),
    )


def _error(name: str, case: Case, plain: bool) -> list[str]:
    error = case["error"]
    if error is None:
        return ["no error, but an answer"]
    bad_key = name == "bad_key"
    kind, status = ("AuthenticationError", 401) if bad_key else ("NotFoundError", 404)
    codes = UNKNOWN_KEY_CODES if bad_key else {"model_not_found"}
    return _unmet(
        (f"class {error['class']}, not {kind}", error["class"] == kind),
        (f"status {error['status']}, not {status}", error["status"] == status),
        (f"code {error['code']!r}, not {sorted(codes)}", error["code"] in codes),
        ("no message", bool(error["message"])),
        ("no type", bool(error["type"])),
        ("no request id", plain or bool(error["request_id"])),
    )


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _unmet(*conditions: tuple[str, bool]) -> list[str]:
    return [reason for reason, held in conditions if not held]
