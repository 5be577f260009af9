"""Relay an answer that is one JSON body: read it whole, settle, then let it go."""

import time
from typing import TYPE_CHECKING

from billing.money import usd_text
from billing.receipts import Outcome
from gateway.errors import NOT_CHARGED, upstream_error
from gateway.protocols.chat_answer import (
    Answer,
    replace_usage,
    texts_in,
    usage_for_client,
    usage_object,
)
from gateway.providers.upstream import UpstreamFailed
from gateway.relay.forward import error_in_answer
from gateway.relay.http_in import Header
from gateway.relay.meter import BodyMeter
from gateway.relay.settle import Bill, wait_settled

if TYPE_CHECKING:
    from gateway.relay.reply import Reply


async def relay_body(reply: "Reply") -> None:
    """Read, settle, send. Raises UpstreamFailed or DeadlineMissed before anything was sent."""
    body = await _read_all(reply)
    meter = BodyMeter()
    meter.read(body)
    reply.seen = meter.seen
    if (error := error_in_answer(body)) is not None:
        await reply.fail(error, Outcome.VOIDED)
        return
    if meter.answer is None or not meter.answer.has_choices:
        message = f"The provider's answer is no chat completion. {NOT_CHARGED}"
        await reply.fail(upstream_error(message, may_have_billed=True), Outcome.UPSTREAM_FAILED)
        return
    if meter.seen.report is None or meter.seen.report.usage is None:
        meter.seen.add_text(texts_in(body))
    bill = await reply.bill()
    available = await wait_settled(reply.settle(Outcome.COMPLETE, bill))
    body = _with_price(body, meter.answer, bill, f"rcpt_{reply.call.request_id}")
    await reply.client.head(200, _headers(reply, len(body), bill, available))
    await reply.client.body(body, more=False)


async def _read_all(reply: "Reply") -> bytes:
    assert reply.upstream is not None
    settings = reply.services.settings
    chunk_s, bytes_max = settings.timeouts.upstream_chunk_s, settings.limits.response_bytes_max
    parts: list[bytes] = []
    size = drained = 0
    while chunk := await reply.dog.wait(reply.upstream.read(), chunk_s):
        if not parts:
            reply.call.first_byte_at = time.time()
        parts.append(chunk)
        size += len(chunk)
        if reply.client.gone:
            drained += len(chunk)
            if drained > settings.limits.drain_bytes_max:
                raise UpstreamFailed("nobody waits for the rest", may_have_billed=True)
        if size > bytes_max:
            reason = f"the answer is larger than {bytes_max} bytes"
            raise UpstreamFailed(reason, may_have_billed=True)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _with_price(body: bytes, answer: Answer, bill: Bill, receipt_id: str) -> bytes:
    price_nanos = bill.charge.price_nanos
    if answer.has_usage:
        new = usage_for_client(answer.usage, price_nanos, receipt_id)
        return replace_usage(body, answer.usage, new)
    new = usage_for_client(usage_object(bill.usage), price_nanos, receipt_id)
    return body.rstrip()[:-1] + b',"usage":' + new + b"}"


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
