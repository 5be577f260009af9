"""A provider that fails: what the client is told, and that nobody pays for what did not come."""

import json
from typing import Any

import pytest

from tests.support.rawclient import Outcome
from tests.support.relay import MESSAGES, Relay, Tokens, error_of, price_by_hand, text_of, zoo
from tests.support.upstream.launch import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
STATUSES = {
    400: (400, "invalid_value"),
    401: (502, "upstream_error"),
    402: (502, "upstream_error"),
    403: (502, "upstream_error"),
    404: (502, "upstream_error"),
    408: (504, "upstream_timeout"),
    413: (413, "invalid_request"),
    418: (502, "upstream_error"),
    422: (422, "invalid_request"),
    429: (503, "upstream_error"),
    500: (502, "upstream_error"),
    503: (502, "upstream_error"),
    504: (504, "upstream_timeout"),
}
MID_STREAM = ["cut:after=3,prompt=9", "cut:after=3,prompt=9,rst=1", "error-in-200:after=3,prompt=9"]
MODELS: dict[str, Any] = {
    **zoo(*(f"status:{status}" for status in STATUSES)),
    **zoo("status:429,retry_after=7", "status:429,retry_after=999", "status-html:502"),
    **zoo("redirect", "error-in-200", "error-in-200:done=0", "html-200", "cut", "cut:after=0"),
    **zoo(
        "refuse-close", "refuse-close:rst=1", *MID_STREAM, "error-in-200:after=3,prompt=9,done=0"
    ),
    "dead": {**zoo("plain")["plain"], "routes": [{"provider": "dead"}]},
    "nowhere": {**zoo("plain")["plain"], "routes": [{"provider": "nowhere"}]},
}
OVERRIDES = {
    "providers__dead": {"kind": "openai", "base_url": "http://127.0.0.1:1/v1"},
    "providers__nowhere": {"kind": "openai", "base_url": "http://nowhere.invalid/v1"},
}


async def free_failure(
    relay: Relay, key: str, model: str, stream: bool, outcome: str
) -> tuple[Outcome, dict[str, Any]]:
    """(answer, error) of a call that fails, costs nothing and leaves one receipt."""
    answer = await relay.call(key, model, stream=stream)
    error = error_of(answer)
    receipt = await relay.only_receipt(key)
    assert answer.head is not None
    assert "You were not charged." in error["message"]
    assert (receipt["outcome"], receipt["price_nanos"]) == (outcome, 0)
    assert (receipt["usage_source"], receipt["cost_source"]) == ("none", "none")
    assert answer.head.get("x-receipt-id") == f"rcpt_{receipt['source_reference']}"
    assert answer.head.get("set-cookie") is None
    assert answer.head.get("location") is None
    return answer, error


@pytest.mark.parametrize(
    ("status", "stream"),
    [*((status, False) for status in STATUSES), *((status, True) for status in (400, 429, 500))],
)
async def test_a_status_of_the_provider(relay: Relay, key: str, status: int, stream: bool) -> None:
    answer, error = await free_failure(relay, key, f"status:{status}", stream, "voided")

    assert (answer.status, error["code"]) == STATUSES[status]
    assert answer.head is not None
    assert answer.head.get("x-should-retry") is None


async def test_what_the_caller_can_mend_is_told_in_the_providers_words(
    relay: Relay, key: str
) -> None:
    """Found: the provider's own codes became labels of our metrics, without a bound."""
    _, error = await free_failure(relay, key, "status:400", False, "voided")

    assert "The upstream says 400." in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["doc_url"].endswith("#upstream_refused")
    metrics = relay.services.metrics.render().decode()
    assert "invalid_value" not in metrics
    assert 'code="upstream_refused"' in metrics


@pytest.mark.parametrize("status", [401, 402, 403])
async def test_the_operators_credential_is_never_the_callers(
    relay: Relay, key: str, status: int
) -> None:
    _, error = await free_failure(relay, key, f"status:{status}", False, "voided")

    assert "The upstream says" not in error["message"]
    assert "gateway's credential" in error["message"]


@pytest.mark.parametrize(("asked", "told"), [(7, "7"), (999, "60")])
async def test_a_provider_that_limits_us_is_passed_on_as_a_time_to_wait(
    relay: Relay, key: str, asked: int, told: str
) -> None:
    model = f"status:429,retry_after={asked}"
    answer, _ = await free_failure(relay, key, model, False, "voided")

    assert answer.head is not None
    assert answer.head.get("retry-after") == told


@STREAMED
async def test_a_page_of_html_in_place_of_an_error(relay: Relay, key: str, stream: bool) -> None:
    answer, error = await free_failure(relay, key, "status-html:502", stream, "voided")

    assert (answer.status, error["code"]) == (502, "upstream_error")
    assert "<" not in error["message"]


@STREAMED
async def test_redirects_are_not_followed(
    relay: Relay, key: str, stream: bool, upstream: Upstream
) -> None:
    answer, _ = await free_failure(relay, key, "redirect", stream, "voided")

    assert answer.status == 502
    assert upstream.stats()["redirects_followed"] == 0


@STREAMED
@pytest.mark.parametrize("model", ["dead", "nowhere"])
async def test_a_provider_that_cannot_be_reached(
    relay: Relay, key: str, model: str, stream: bool
) -> None:
    answer, error = await free_failure(relay, key, model, stream, "voided")

    assert (answer.status, error["code"]) == (502, "upstream_error")
    assert answer.head is not None
    assert answer.head.get("x-should-retry") is None


@STREAMED
@pytest.mark.parametrize("model", ["refuse-close", "refuse-close:rst=1"])
async def test_a_provider_that_hangs_up_before_its_answer(
    relay: Relay, key: str, model: str, stream: bool
) -> None:
    """It has read the request and may bill for it: SDKs must not repeat that by themselves."""
    answer, error = await free_failure(relay, key, model, stream, "upstream_failed")

    assert (answer.status, error["code"]) == (502, "upstream_error")
    assert answer.head is not None
    assert answer.head.get("x-should-retry") == "false"


@STREAMED
@pytest.mark.parametrize("model", ["error-in-200", "error-in-200:done=0"])
async def test_an_error_with_status_200(relay: Relay, key: str, model: str, stream: bool) -> None:
    """Found: the message did not say whether it was charged."""
    answer, error = await free_failure(relay, key, model, stream, "voided")

    assert (answer.status, error["code"]) == (502, "upstream_error")
    assert "The server had an error" in error["message"]


@STREAMED
async def test_a_page_of_html_with_status_200(relay: Relay, key: str, stream: bool) -> None:
    answer, error = await free_failure(relay, key, "html-200", stream, "upstream_failed")

    assert answer.status == 502
    assert "no chat completion" in error["message"]


async def test_a_body_that_breaks_off(relay: Relay, key: str) -> None:
    answer, _ = await free_failure(relay, key, "cut", False, "upstream_failed")

    assert answer.status == 502
    assert answer.head is not None
    assert answer.head.get("x-should-retry") == "false"


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("model", [*MID_STREAM, "error-in-200:after=3,prompt=9,done=0"])
async def test_a_failure_in_the_middle_of_a_stream(
    relay: Relay, key: str, model: str, include_usage: bool
) -> None:
    """One frame with an error and without choices, then [DONE]; what was delivered is charged."""
    options = {"include_usage": include_usage}
    answer = await relay.call(key, model, stream=True, stream_options=options)
    receipt = await relay.only_receipt(key)

    *frames, failed, done = answer.frames()
    assert done == "[DONE]"
    error = json.loads(failed)
    assert set(error) == {"error"}
    assert error["error"]["code"] == "upstream_error"
    text = text_of([json.loads(frame) for frame in frames])
    if "rst" not in model:  # a reset may overtake what was sent before it
        assert len(text.split()) == 3
    assert receipt["outcome"] == "upstream_failed"
    assert receipt["usage_source"] == ("counted" if text else "none")
    tokens = Tokens(prompt=receipt["input_tokens"], completion=receipt["output_tokens"])
    assert receipt["price_nanos"] == price_by_hand(tokens) == await relay.spent(key)
    assert bool(text) == bool(receipt["price_nanos"])
    said = "You were charged for what was delivered" if text else "You were not charged"
    assert f"{said} (receipt rcpt_{receipt['source_reference']})." in error["error"]["message"]


async def test_a_stream_that_breaks_off_before_its_first_text_is_free(
    relay: Relay, key: str
) -> None:
    answer = await relay.call(key, "cut:after=0", stream=True)
    receipt = await relay.only_receipt(key)

    assert json.loads(answer.frames()[-2])["error"]["code"] == "upstream_error"
    assert (receipt["outcome"], receipt["price_nanos"]) == ("upstream_failed", 0)


async def test_the_prompt_of_a_failed_stream_is_counted_from_the_request(
    relay: Relay, key: str
) -> None:
    await relay.call(key, "cut:after=3,prompt=9", stream=True)
    receipt = await relay.only_receipt(key)

    assert 5 < receipt["input_tokens"] < len(json.dumps(MESSAGES))
    assert 3 <= receipt["output_tokens"] <= 6
