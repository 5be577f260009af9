"""What `farebox receipts show` makes of a receipt."""

import json

import pytest

from billing.receipts import FailedAttempt
from gateway.cli import show
from gateway.cli.receipts import for_people

ROW = {
    "provider": "second",
    "attempt": 3,
    "failed_attempts": (
        FailedAttempt(
            provider="first", upstream_model="m-1", status=503, reason="server_error", ms=41
        ),
        FailedAttempt(
            provider="dead", upstream_model="m", status=None, reason="no_connection", ms=3
        ),
    ),
}


def test_each_failed_attempt_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    show.pairs(for_people(ROW, {"seq": 7}))

    assert [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()] == [
        ["provider", "second"],
        ["attempt", "3"],
        ["failed_attempt_1", "first (m-1): server_error, HTTP 503, 41 ms"],
        ["failed_attempt_2", "dead (m): no_connection, no answer, 3 ms"],
        ["ledger_seq", "7"],
    ]


def test_programs_get_failed_attempts_as_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    show.as_json(ROW)

    first, second = json.loads(capsys.readouterr().out)["failed_attempts"]
    assert (first["status"], first["ms"]) == (503, 41)
    assert second == {
        **{"provider": "dead", "upstream_model": "m", "status": None},
        **{"reason": "no_connection", "ms": 3},
    }
