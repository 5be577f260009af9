"""The receipt of a request whose worker is gone, from what it last wrote into the hold. Pure.

A request that may have reached a provider is never free and never costs its whole hold: it costs
what its worker had written down as certain. Marked `checkpoint`, so that the worker's own receipt
can correct it, should the worker live after all.
"""

from datetime import datetime

from msgspec.structs import replace

from billing.prices import Rates, charge_for
from billing.receipts import ChargeReceipt, Outcome
from billing.usage import Usage, UsageSource


def recovered_receipt(
    draft: ChargeReceipt, *, is_forwarded: bool, held_nanos: int, rates: Rates | None, now: datetime
) -> ChargeReceipt:
    """The receipt that ends this hold. draft: with the token counts of the last checkpoint.

    rates: of the draft's price version; None for a model without a price.
    """
    usage = Usage(input_tokens=draft.input_tokens, output_tokens=draft.output_tokens)
    if not is_forwarded:
        usage, rates = Usage(), None
    charge = charge_for(usage, rates, None, draft.markup_bps, held_nanos)
    return replace(
        draft,
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        usage_source=UsageSource.CHECKPOINT,
        hold_nanos=held_nanos,
        provider_cost_nanos=charge.cost_nanos,
        price_nanos=charge.price_nanos,
        overrun_nanos=charge.overrun_nanos,
        cost_source=charge.cost_source,
        outcome=Outcome.RECOVERED if is_forwarded else Outcome.VOIDED,
        finished_at=max(now, draft.started_at),
    )
