"""The way of a chat completion: authenticate, read, admit, then the reply does the rest."""

import time

from billing.errors import BillingError
from billing.idempotency import Claim
from billing.receipts import Outcome
from gateway.errors import ApiError, to_api_error, unavailable
from gateway.http1.exchange import Exchange
from gateway.protocols import chat
from gateway.relay.admit import admit, prepare
from gateway.relay.aside import LARGE_BYTES
from gateway.relay.bars import caller_address, check_address, check_inference
from gateway.relay.call import Arrival, Call
from gateway.relay.http_in import (
    ClientLeft,
    check_headers,
    note_labels,
    read_body,
    send_error,
)
from gateway.relay.once import ADMITTED_WITHIN_S, HEADER, HELD_BY_ANOTHER, check_key, make_claim
from gateway.relay.record import record
from gateway.relay.reply import Reply
from gateway.relay.seen import Seen
from gateway.relay.settle import VOID, end_call, finish, wait_settled
from gateway.services import Services
from gateway.single_headers import by_name
from keys.errors import KeysError

ROUTE = "/v1/chat/completions"


async def chat_completions(services: Services, arrival: Arrival, exchange: Exchange) -> None:
    """Serve one chat completion, or refuse it with the OpenAI envelope."""
    call: Call | None = None
    is_admitted = False
    try:
        call, claim = await _prepared(services, arrival, exchange)
        if claim is None:
            await admit(services, call)
        else:
            await _admit_once(services, call, claim)
        is_admitted = True
    except ClientLeft:
        services.metrics.count_request(ROUTE, 0, "client_left")
        return
    except (ApiError, KeysError, BillingError) as exc:
        error = to_api_error(exc)
        services.metrics.count_request(ROUTE, error.status, error.label)
        send_error(exchange, error, arrival)
        return
    finally:
        # After the refusal is sent: without the till this waits for the book.
        if call is not None and call.is_open and not is_admitted:
            await finish(_void(services, call))
    reply = Reply(services, call)
    await reply(exchange)
    services.metrics.count_request(ROUTE, reply.client.status, reply.code)


async def _admit_once(services: Services, call: Call, claim: Claim) -> None:
    """Admit the request that has its Idempotency-Key to itself, or leave the key to others."""
    began = time.monotonic()
    try:
        await services.claims.take(call.scopes, claim)
        # crash-point: claim.taken
        await admit(services, call)
        if time.monotonic() - began > ADMITTED_WITHIN_S:
            raise unavailable("Admitting this request took too long.")
    except HELD_BY_ANOTHER:
        raise
    except BaseException:
        # Before the refusal is sent, so that whoever mends the request can send it at once.
        await finish(services.claims.release(claim))
        raise


async def _prepared(
    services: Services, arrival: Arrival, exchange: Exchange
) -> tuple[Call, Claim | None]:
    settings = services.settings
    headers = by_name(exchange.headers)
    check_headers(exchange, headers, settings.limits.headers_bytes_max)
    caller = await services.authenticator.authenticate(headers)
    if caller.bars is not None:
        check_address(caller.bars, caller_address(exchange.peer, exchange.headers, settings))
        check_inference(caller.bars)
    note_labels(arrival, headers)
    once_key = headers.get(HEADER)
    if once_key is not None:
        check_key(once_key)
    limits, timeouts = settings.limits, settings.timeouts
    body = await read_body(
        exchange, headers, limits.body_bytes_max, timeouts.body_s, services.bodies
    )
    if len(body) < LARGE_BYTES:
        facts = chat.read_facts(body)
    else:
        facts = await services.aside.run(lambda: chat.read_facts(body))
    call = prepare(services, arrival, caller, facts)
    return call, None if once_key is None else await make_claim(services.aside, call, once_key)


async def _void(services: Services, call: Call) -> None:
    """The till did not say whether the hold is there: one free receipt ends it in any case."""
    # crash-point: void.begin
    settled = end_call(services, call, Outcome.VOIDED, VOID, Seen())
    record(services, call, settled.receipt)
    await wait_settled(services, settled)
