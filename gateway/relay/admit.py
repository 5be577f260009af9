"""Stage 2: find the model, size the hold, place it. Nothing goes upstream before this."""

import time

from billing.errors import (
    AccountUnknown,
    BookUnavailable,
    ReceiptsPending,
    Refusal,
    TillUnavailable,
)
from billing.prices import Rates
from billing.quote import hold_for, input_ceiling
from billing.receipts import Outcome, encode_receipt
from gateway.errors import invalid, unavailable
from gateway.protocols.chat import unknown_model
from gateway.protocols.facts import CallFacts
from gateway.relay.call import Arrival, Call, Caller, PublicModel
from gateway.services import Services

# Text has hardly ever more bytes for each token than this; English has some four and a half.
BYTES_PER_TOKEN_MOST = 8


def prepare(services: Services, arrival: Arrival, caller: Caller, facts: CallFacts) -> Call:
    """The call that these facts ask for, with the size of its hold. Raises ApiError."""
    model = services.catalog.find(facts.model)
    if model is None:
        raise unknown_model(facts.model, services.catalog.nearest(facts.model))
    if services.is_draining:
        raise unavailable("The gateway is shutting down.")
    if services.shedding.reason:
        raise services.shedding.refusal()
    if not services.settler.accepts:
        raise ReceiptsPending
    if services.open_calls >= services.settings.limits.open_requests_per_worker:
        raise unavailable("The gateway is busy.")
    call = Call(arrival, caller, facts, model, services.prices.now(model.name, time.time_ns()))
    _size_hold(call, services.settings.billing.unpriced == "free")
    return call


async def admit(services: Services, call: Call) -> None:
    """Place the hold. Raises a BillingError; the call is then open if the till may have the hold.

    An open call must be ended, whatever the till said or did not say.
    """
    receipt = call.open_receipt(Outcome.RECOVERED)
    # Should we die before the first checkpoint: surely no more than the prompt's tokens.
    receipt.input_tokens = prompt_least(call.facts)
    draft = encode_receipt(receipt)
    # crash-point: admit.begin
    call.is_open = True
    try:
        await services.till.admit(call.caller.scopes, call.request_id, call.hold_nanos, draft)
    except (Refusal, AccountUnknown, BookUnavailable):
        call.is_open = False
        raise
    except TillUnavailable as exc:
        # What never left this process cannot be held: a till that is down costs no receipts.
        call.is_open = exc.asked
        raise
    # crash-point: admit.placed


def prompt_least(facts: CallFacts) -> int:
    """Tokens of the prompt that are there without doubt; the JSON around the messages is none."""
    around = len(facts.body) - memoryview(facts.fields.get("messages", b"")).nbytes
    return max((facts.text_bytes - around) // BYTES_PER_TOKEN_MOST, 1)


def _size_hold(call: Call, unpriced_is_free: bool) -> None:
    facts, model = call.facts, call.model
    call.input_ceiling = input_ceiling(facts.text_bytes, facts.image_parts, model.image_tokens_max)
    output_tokens = facts.output_tokens or model.output_tokens_max
    call.output_max = (output_tokens + facts.extra_output_tokens) * facts.choices
    rates = call.rates
    if rates is None:
        if not unpriced_is_free:
            message = f"The model '{facts.model}' has no price, so it cannot be used yet."
            raise invalid(message, "model", "unpriced_model")
        return
    if facts.image_parts or facts.audio_output:
        _refuse_unpriced(facts, model, rates)
    call.hold_nanos = hold_for(call.input_ceiling, call.output_max, rates, model.markup_bps)


def _refuse_unpriced(facts: CallFacts, model: PublicModel, rates: Rates) -> None:
    if facts.image_parts and not model.image_tokens_max:
        message = f"The model '{facts.model}' has no price for images."
        raise invalid(message, "messages", "unpriced_parameter")
    if facts.audio_output and rates.audio_output_rate is None:
        message = f"The model '{facts.model}' has no price for audio."
        raise invalid(message, "modalities", "unpriced_parameter")
