"""Stage 3: send the call upstream, and say what a bad answer means to the client.

The routes of a model are tried in order, as long as nothing can have been billed. The provider's
401, 402 and 403 are about the operator's credential, never the caller's, so they must not look
like the caller's; its 429 is not the tenant's own limit.
"""

import logging
import time
from decimal import Decimal

import msgspec

from billing.errors import TillUnavailable
from billing.money import read_reported_usd
from billing.receipts import FailedAttempt, writable
from gateway.errors import NOT_CHARGED, ApiError, upstream_error
from gateway.protocols.chat import upstream_body
from gateway.protocols.chat_answer import read_answer
from gateway.providers.upstream import UpstreamFailed, UpstreamReply, UpstreamRequest
from gateway.relay.call import Call
from gateway.relay.client import Client
from gateway.relay.watchdog import DeadlineMissed, Watchdog
from gateway.services import Services

log = logging.getLogger("gateway.relay")

CHAT_PATH = "/chat/completions"
ERROR_BYTES_MAX = 64 * 1024
ERROR_READ_S = 10.0
MESSAGE_CHARS_MAX = 2000
# What the caller can mend keeps its status.
CALLERS_OWN = frozenset({400, 413, 415, 422})
# A provider that says it took too long (524: the server behind a CDN) may still be at work, and
# bill for it. As with our own deadline no other route is tried: the user would wait once more, and
# the operator might pay twice.
TOO_LATE = frozenset({408, 504, 524})
CREDENTIALS = frozenset({401, 402, 403})
REASONS = {
    **dict.fromkeys(CALLERS_OWN, "refused"),
    **dict.fromkeys(TOO_LATE, "timeout"),
    **dict.fromkeys(CREDENTIALS, "credential"),
    404: "unknown_model",
    429: "rate_limited",
}
RETRY_AFTER_MAX_S = 60
# Header of a cost in USD: https://docs.litellm.ai/docs/proxy/cost_tracking
COST_HEADER = "x-litellm-response-cost"


class _Error(msgspec.Struct):
    message: str = ""
    type: str | None = None
    code: str | int | None = None
    param: str | None = None


async def forward(services: Services, call: Call, dog: Watchdog, client: Client) -> UpstreamReply:
    """Send the call; returns when the head of the answer is there, whatever its status.

    The answer is of the first route that did not fail for free, or of the last one. Raises
    UpstreamFailed or DeadlineMissed; TillUnavailable when the hold cannot be marked first.
    """
    while True:
        waited_s = call.upstream_wait_s
        try:
            reply = await _send(services, call, dog)
        except UpstreamFailed as exc:
            # What was sent in part may have been read, and billed: the client is told so instead.
            if exc.may_have_billed or not _has_next(call, dog, client):
                raise
            _take_next(services, call, waited_s, None, exc.reason)
            continue
        status = reply.status
        if status < 300 or status in CALLERS_OWN:
            return reply
        if status in TOO_LATE or not _has_next(call, dog, client):
            note_failure(services, call, reason_of(status), f"HTTP {status}")
            return reply
        # Nobody waits for the rest of it; when all of it is there, its connection stays usable.
        reply.close()
        _take_next(services, call, waited_s, status, f"HTTP {status}")


async def _send(services: Services, call: Call, dog: Watchdog) -> UpstreamReply:
    route, own_keys = call.route, call.caller.upstream_keys
    request = UpstreamRequest(
        path=CHAT_PATH,
        model=route.upstream_model,
        body=upstream_body(call.facts, route.upstream_model, call.lowered_to),
        stream=call.facts.stream,
        request_id=call.request_id,
        own_key=None if own_keys is None else own_keys.get(route.provider),
    )
    # crash-point: forward.unmarked
    # On the wire before the request is: whoever finds this hold knows that it may have cost.
    # With all that is said to the till in this turn of the loop, in one write at its end.
    await services.till.forwarded_soon(call.scopes, call.request_id)
    if not services.link.is_up and call.is_first_attempt:
        # Nobody who finds the hold would know: a sweeper would end what is forwarded for nothing.
        raise TillUnavailable
    # crash-point: forward.marked
    call.is_sent = True
    began = time.monotonic()
    try:
        reply = await dog.wait(route.upstream.send(request), route.first_byte_timeout_s)
    finally:
        call.upstream_wait_s += time.monotonic() - began
    # crash-point: forward.answered
    # Bytes that are no text come as surrogates, which fit into no receipt.
    provider_id = (reply.header("x-request-id") or "")[:256]
    call.upstream_request_id = provider_id if provider_id.isprintable() else ""
    return reply


def _has_next(call: Call, dog: Watchdog, client: Client) -> bool:
    """Whether another route is left, and anybody to try it for."""
    receipt = call.receipt
    assert receipt is not None
    return receipt.attempt < len(call.model.routes) and not client.gone and not dog.is_over


def _take_next(
    services: Services, call: Call, waited_s: float, status: int | None, why: str
) -> None:
    """Note what this route did and go on with the next. waited_s: for those before it."""
    route, reason = call.route, reason_of(status)
    note_failure(services, call, reason, why)
    failed = FailedAttempt(
        provider=route.provider,
        upstream_model=writable(route.upstream_model),
        status=status,
        reason=reason,
        ms=int((call.upstream_wait_s - waited_s) * 1000),
    )
    call.next_route(failed)
    # crash-point: route.next


def note_failure(services: Services, call: Call, reason: str, why: str) -> None:
    """Tell the operator that an attempt failed. reason is one of a few words, why says more."""
    provider = call.route.provider
    services.metrics.count_upstream_failure(provider, reason)
    facts = {"request_id": call.request_id, "provider": provider, "reason": why}
    log.warning("upstream.failed", extra=facts)


def reason_of(status: int | None) -> str:
    """One of a few words for metrics and receipts; None: no connection, so no answer."""
    if status is None:
        return "no_connection"
    return REASONS.get(status) or ("server_error" if status >= 500 else "odd_status")


def cost_in_header(reply: UpstreamReply) -> Decimal | None:
    """The cost in USD that LiteLLM writes into a header of its answers."""
    text = reply.header(COST_HEADER)
    return None if text is None else read_reported_usd(text.strip())


async def read_error(reply: UpstreamReply, dog: Watchdog, call: Call) -> ApiError:
    """The client's view of an answer whose status is not 2xx."""
    own_keys = call.caller.upstream_keys
    if reply.status in CREDENTIALS and own_keys is not None and call.route.provider in own_keys:
        return _own_key_refused(reply.status)
    body = b""
    try:
        while len(body) < ERROR_BYTES_MAX and (chunk := await dog.wait(reply.read(), ERROR_READ_S)):
            body += chunk
    except (UpstreamFailed, DeadlineMissed):
        pass  # the status says enough
    return _translate(reply, _error_in(body))


def error_in_answer(body: bytes) -> ApiError | None:
    """The client's view of an error that came with status 200; None when there is none."""
    answer = read_answer(body)
    if answer is None or not answer.has_error:
        return None
    said = _error_in(body).message
    return upstream_error(f"The provider failed: {said}" if said else "The provider failed.")


def _error_in(body: bytes) -> _Error:
    answer = read_answer(body)
    if answer is None:
        return _Error()
    try:
        error = msgspec.json.decode(answer.error, type=_Error | str | None)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return _Error()
    if isinstance(error, str):
        error = _Error(message=error)
    error = error or _Error()
    error.message = error.message[:MESSAGE_CHARS_MAX]
    return error


def _translate(reply: UpstreamReply, error: _Error) -> ApiError:
    status = reply.status
    said = f": {error.message}" if error.message else "."
    if status in CALLERS_OWN:
        exc = ApiError(
            status,
            str(error.code or "invalid_request"),
            f"The provider refused the request (HTTP {status}){said} {NOT_CHARGED}",
            kind=error.type or "invalid_request_error",
            param=error.param,
        )
        exc.label = "upstream_refused"
        return exc
    if status == 429:
        message = f"The provider is limiting our requests. {NOT_CHARGED} Try again later."
        exc = upstream_error(message, status=503)
        exc.headers = ((b"retry-after", b"%d" % _retry_after_s(reply)),)
        return exc
    if status in CREDENTIALS:
        message = f"The provider does not accept the gateway's credential (HTTP {status})."
        return upstream_error(f"{message} Tell the operator. {NOT_CHARGED}")
    if status == 404:
        message = "The provider does not know this model (HTTP 404). Tell the operator."
        return upstream_error(f"{message} {NOT_CHARGED}")
    if status in TOO_LATE:
        message = f"The provider took too long (HTTP {status}). {NOT_CHARGED}"
        return upstream_error(message, status=504, code="upstream_timeout")
    return upstream_error(f"The provider failed (HTTP {status}){said} {NOT_CHARGED}")


def _own_key_refused(status: int) -> ApiError:
    message = (
        f"The provider does not accept the upstream credential of this API key (HTTP {status}). "
        f"Set another one, or delete it. {NOT_CHARGED}"
    )
    return upstream_error(message)


def _retry_after_s(reply: UpstreamReply) -> int:
    text = reply.header("retry-after") or ""
    return max(1, min(int(text), RETRY_AFTER_MAX_S)) if text.isdecimal() and len(text) < 10 else 5
