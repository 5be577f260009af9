"""Relay an answer that is one JSON body: read it whole, settle, then let it go."""

import time
from typing import TYPE_CHECKING

from billing.money import usd_text
from billing.receipts import Outcome
from billing.usage import UsageSource
from gateway.errors import NOT_CHARGED, ApiError, upstream_error
from gateway.http1.exchange import Header
from gateway.protocols.chat_answer import (
    Answer,
    usage_for_client,
    usage_object,
    usage_place,
    with_usage,
)
from gateway.providers.upstream import UpstreamFailed
from gateway.relay.aside import LARGE_BYTES
from gateway.relay.forward import error_in_answer
from gateway.relay.meter import BodyMeter
from gateway.relay.settle import Bill, bill_reported, finish, wait_settled
from gateway.relay.watchdog import DeadlineMissed

if TYPE_CHECKING:
    from gateway.relay.reply import Reply

SENT_BYTES = 256 * 1024


async def relay_body(reply: "Reply") -> None:
    """Read, settle, send. Raises UpstreamFailed or DeadlineMissed before anything was sent."""
    parts = await _read_all(reply)
    if sum(map(len, parts)) >= LARGE_BYTES:
        meter = await finish(_meter_large(reply, parts))
    else:
        meter = BodyMeter(parts[0] if len(parts) == 1 else b"".join(parts))
        reply.seen = meter.seen
    body, answer = meter.body, meter.answer
    if answer is not None and answer.has_error:
        error = await _error_of(reply, body)
        error.message += f" {NOT_CHARGED}"
        await reply.fail(error, Outcome.VOIDED)
        return
    if answer is None or not meter.is_completion:
        message = f"The provider's answer is no chat completion. {NOT_CHARGED}"
        await reply.fail(upstream_error(message, may_have_billed=True), Outcome.UPSTREAM_FAILED)
        return
    bill = await reply.bill()
    available = await wait_settled(reply.services, reply.settle(Outcome.COMPLETE, bill))
    # crash-point: body.settled
    usage = _priced(answer, bill, f"rcpt_{reply.call.request_id}")
    if len(body) >= LARGE_BYTES:
        await _send_large(reply, meter, usage, bill, available)
        return
    body = with_usage(body, answer, usage)
    reply.client.head(200, _headers(reply, len(body), bill, available))
    reply.client.last(body)
    # crash-point: body.sent


async def _meter_large(reply: "Reply", parts: list[bytes]) -> BodyMeter:
    """Read it, and its text if it may have to be counted, without holding the event loop."""
    aside = reply.services.aside
    meter = await aside.run(lambda: BodyMeter(b"".join(parts)))
    reply.seen = meter.seen
    if bill_reported(reply.call, meter.seen, reply.header_usd) is None:
        await aside.run(meter.seen.text)
    return meter


async def _error_of(reply: "Reply", body: bytes) -> ApiError:
    if len(body) < LARGE_BYTES:
        error = error_in_answer(body)
    else:
        error = await reply.services.aside.run(lambda: error_in_answer(body))
    assert error is not None
    return error


async def _send_large(
    reply: "Reply", meter: BodyMeter, usage: bytes, bill: Bill, available: int | None
) -> None:
    """Send it with another usage object, without a copy of the whole."""
    body, answer = meter.body, meter.answer
    assert answer is not None
    place = await reply.services.aside.run(lambda: usage_place(body, answer))
    if place is None:
        body = await reply.services.aside.run(lambda: with_usage(body, answer, usage))
        place, usage = (0, 0), b""
    length = len(body) - (place[1] - place[0]) + len(usage)
    reply.client.head(200, _headers(reply, length, bill, available))
    for start, end in ((0, place[0]), (place[1], len(body))):
        for at in range(start, end, SENT_BYTES):
            await reply.client.body(body[at : min(at + SENT_BYTES, end)])
        if end == place[0]:
            await reply.client.body(usage)
    reply.client.last(b"")


async def _read_all(reply: "Reply") -> list[bytes]:
    assert reply.upstream is not None
    settings, call = reply.services.settings, reply.call
    if (body := reply.upstream.whole()) is not None:
        call.first_byte_at = time.time()
        _check_size(len(body), settings.limits.response_bytes_max)
        return [body]
    chunk_s, bytes_max = settings.timeouts.upstream_chunk_s, settings.limits.response_bytes_max
    parts: list[bytes] = []
    size = drained = 0
    began = time.monotonic()
    while chunk := await reply.dog.wait(reply.upstream.read(), chunk_s):
        if not parts:
            call.first_byte_at = time.time()
        parts.append(chunk)
        size += len(chunk)
        if reply.client.gone:
            drained += len(chunk)
            if drained > settings.limits.drain_bytes_max:
                raise DeadlineMissed
        _check_size(size, bytes_max)
    call.upstream_wait_s += time.monotonic() - began
    return parts


def _check_size(size: int, bytes_max: int) -> None:
    if size > bytes_max:
        reason = f"the answer is larger than {bytes_max} bytes"
        raise UpstreamFailed(reason, may_have_billed=True)


def _priced(answer: Answer, bill: Bill, receipt_id: str) -> bytes:
    """The usage object that the client gets."""
    counted = bill.usage_source is UsageSource.COUNTED
    told = usage_object(bill.usage) if counted else answer.usage
    return usage_for_client(told, bill.charge.price_nanos, receipt_id)


def _headers(reply: "Reply", length: int, bill: Bill, available: int | None) -> list[Header]:
    headers: list[Header] = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % length),
        *reply.id_headers(),
        (b"x-cost-usd", usd_text(bill.charge.price_nanos).encode()),
    ]
    if available is not None:
        headers.append((b"x-balance-usd", usd_text(available).encode()))
    return headers
