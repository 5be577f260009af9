"""Relay an answer that is one JSON body: read it whole, settle, then let it go."""

import time
from typing import TYPE_CHECKING

from billing.money import usd_text
from billing.receipts import Outcome
from billing.usage import UsageSource
from gateway.errors import NOT_CHARGED, upstream_error
from gateway.http1.exchange import Header
from gateway.protocols.chat_answer import Answer, usage_for_client, usage_object, with_usage
from gateway.providers.upstream import UpstreamFailed
from gateway.relay.forward import error_in_answer
from gateway.relay.meter import BodyMeter
from gateway.relay.settle import Bill, wait_settled
from gateway.relay.watchdog import DeadlineMissed

if TYPE_CHECKING:
    from gateway.relay.reply import Reply


async def relay_body(reply: "Reply") -> None:
    """Read, settle, send. Raises UpstreamFailed or DeadlineMissed before anything was sent."""
    body = await _read_all(reply)
    meter = BodyMeter(body)
    reply.seen = meter.seen
    if (error := error_in_answer(body)) is not None:
        error.message += f" {NOT_CHARGED}"
        await reply.fail(error, Outcome.VOIDED)
        return
    answer = meter.answer
    if answer is None or not (answer.has_choices or answer.has_usage):
        message = f"The provider's answer is no chat completion. {NOT_CHARGED}"
        await reply.fail(upstream_error(message, may_have_billed=True), Outcome.UPSTREAM_FAILED)
        return
    bill = await reply.bill()
    available = await wait_settled(reply.settle(Outcome.COMPLETE, bill))
    body = _with_price(body, answer, bill, f"rcpt_{reply.call.request_id}")
    reply.client.head(200, _headers(reply, len(body), bill, available))
    reply.client.last(body)


async def _read_all(reply: "Reply") -> bytes:
    assert reply.upstream is not None
    settings, call = reply.services.settings, reply.call
    if (body := reply.upstream.whole()) is not None:
        call.first_byte_at = time.time()
        _check_size(len(body), settings.limits.response_bytes_max)
        return body
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
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _check_size(size: int, bytes_max: int) -> None:
    if size > bytes_max:
        reason = f"the answer is larger than {bytes_max} bytes"
        raise UpstreamFailed(reason, may_have_billed=True)


def _with_price(body: bytes, answer: Answer, bill: Bill, receipt_id: str) -> bytes:
    counted = bill.usage_source is UsageSource.COUNTED
    told = usage_object(bill.usage) if counted else answer.usage
    return with_usage(body, answer, usage_for_client(told, bill.charge.price_nanos, receipt_id))


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
