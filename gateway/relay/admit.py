"""Stage 2: find the model, size the hold, place it. Nothing goes upstream before this."""

import time

from billing.errors import (
    AccountUnknown,
    BookUnavailable,
    InsufficientCredit,
    ReceiptsPending,
    Refusal,
    TillUnavailable,
)
from billing.prices import Rates
from billing.receipts import Outcome, encode_receipt
from gateway.errors import invalid, unavailable
from gateway.protocols.chat import unknown_model
from gateway.protocols.facts import CallFacts
from gateway.relay.afford import bound_prompt, fit, likely_tokens, prompt_least, size_hold
from gateway.relay.bars import check_model
from gateway.relay.call import Arrival, Call, Caller, PublicModel
from gateway.services import Services

# What is available may change between a refusal and the next try.
FIT_TRIES = 3


def prepare(services: Services, arrival: Arrival, caller: Caller, facts: CallFacts) -> Call:
    """The call that these facts ask for, with the size of its hold. Raises ApiError."""
    if (allowed := caller.principal.models) is not None:
        check_model(allowed, facts.model)
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


async def admit(services: Services, call: Call, tries: int = FIT_TRIES) -> None:
    """Place the hold. Raises a BillingError; the call is then open if the till may have the hold.

    An open call must be ended, whatever the till said or did not say. A call that costs more than
    what is available is made to fit, if that leaves something useful.
    """
    receipt = call.open_receipt(Outcome.RECOVERED)
    # Should we die before the first checkpoint: surely no more than the prompt's tokens.
    receipt.input_tokens = prompt_least(call.facts)
    draft = encode_receipt(receipt)
    # crash-point: admit.begin
    call.is_open = True
    try:
        tokens = likely_tokens(call) if call.scopes.wire.counts_tokens else 0
        call.standings = await services.till.admit(
            call.scopes, call.request_id, call.hold_nanos, draft, tokens
        )
    except InsufficientCredit as exc:
        call.is_open = False
        await _fit(services, call, exc, tries)
    except (Refusal, AccountUnknown, BookUnavailable):
        call.is_open = False
        raise
    except TillUnavailable as exc:
        # What never left this process cannot be held: a till that is down costs no receipts.
        call.is_open = exc.asked
        raise
    # crash-point: admit.placed


async def _fit(services: Services, call: Call, exc: InsufficientCredit, tries: int) -> None:
    """Admit what can be paid of a call, or refuse it with what it needs as it was asked for."""
    output_min = services.settings.limits.output_tokens_min
    fits = await fit(call, exc.available_nanos, output_min, services.counter)
    if not fits or not tries:
        exc.needed_nanos = call.hold_nanos
        raise exc
    await admit(services, call, tries - 1)


def _size_hold(call: Call, unpriced_is_free: bool) -> None:
    facts, model, rates = call.facts, call.model, call.rates
    bound_prompt(call)
    call.output_max = (call.output_tokens + facts.extra_output_tokens) * facts.choices
    if rates is None:
        if not unpriced_is_free:
            message = f"The model '{facts.model}' has no price, so it cannot be used yet."
            raise invalid(message, "model", "unpriced_model")
        return
    if facts.image_parts or facts.audio_output:
        _refuse_unpriced(facts, model, rates)
    size_hold(call, rates)


def _refuse_unpriced(facts: CallFacts, model: PublicModel, rates: Rates) -> None:
    if facts.image_parts and not model.image_tokens_max:
        message = f"The model '{facts.model}' has no price for images."
        raise invalid(message, "messages", "unpriced_parameter")
    if facts.audio_output and rates.audio_output_rate is None:
        message = f"The model '{facts.model}' has no price for audio."
        raise invalid(message, "modalities", "unpriced_parameter")
