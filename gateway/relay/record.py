"""What is told about a settled call: one log event and the metrics. Never content."""

import logging

from billing.receipts import ChargeReceipt
from gateway.relay.call import Call
from gateway.services import Services

log = logging.getLogger("gateway.request")


def record(services: Services, call: Call, receipt: ChargeReceipt) -> None:
    """Count and log one receipt."""
    services.metrics.count_receipt(receipt)
    ttft_s = None
    if call.first_byte_at is not None:
        ttft_s = call.first_byte_at - call.arrival.started_at
        services.metrics.ttft(receipt.provider, receipt.requested_model, ttft_s)
    if not log.isEnabledFor(logging.INFO):
        return
    log.info(
        "request.settled",
        extra={
            "request_id": f"req_{call.request_id}",
            "account_id": call.caller.account_text,
            "key_id": call.caller.key_text,
            "model": receipt.requested_model,
            "provider": receipt.provider,
            "outcome": receipt.outcome,
            "usage_source": receipt.usage_source,
            "cost_source": receipt.cost_source,
            "input_tokens": receipt.input_tokens,
            "output_tokens": receipt.output_tokens,
            "cost_nanos": receipt.provider_cost_nanos,
            "price_nanos": receipt.price_nanos,
            "hold_nanos": receipt.hold_nanos,
            "overrun_nanos": receipt.overrun_nanos,
            "ttft_ms": None if ttft_s is None else round(ttft_s * 1000, 2),
        },
    )
