"""What is told about a settled call: one log event and the metrics. Never content."""

import msgspec

from billing.receipts import ChargeReceipt
from gateway.log import EventLog
from gateway.relay.call import Call
from gateway.services import Services

events = EventLog("gateway.request")


class _Settled(msgspec.Struct):
    """The facts of `request.settled`, in the order of its line."""

    request_id: str
    account_id: str
    key_id: str
    model: str
    provider: str
    outcome: str
    usage_source: str
    cost_source: str
    input_tokens: int
    output_tokens: int
    cost_nanos: int
    price_nanos: int
    hold_nanos: int
    overrun_nanos: int
    ttft_ms: float | None


def record(services: Services, call: Call, receipt: ChargeReceipt) -> None:
    """Count and log one receipt."""
    metrics = services.metrics
    metrics.count_receipt(receipt)
    ttft_ms = None
    if call.first_byte_at is not None:
        ttft_s = call.first_byte_at - call.arrival.started_at
        ttft_ms = round(ttft_s * 1000, 2)
        metrics.ttft(receipt.provider, receipt.requested_model, ttft_s)
    if not events.is_on:
        return
    caller = call.caller
    facts = _Settled(
        request_id=f"req_{receipt.source_reference}",
        account_id=caller.account_text,
        key_id=caller.key_text,
        model=receipt.requested_model,
        provider=receipt.provider,
        outcome=receipt.outcome,
        usage_source=receipt.usage_source,
        cost_source=receipt.cost_source,
        input_tokens=receipt.input_tokens,
        output_tokens=receipt.output_tokens,
        cost_nanos=receipt.provider_cost_nanos,
        price_nanos=receipt.price_nanos,
        hold_nanos=receipt.hold_nanos,
        overrun_nanos=receipt.overrun_nanos,
        ttft_ms=ttft_ms,
    )
    events.info("request.settled", facts)
