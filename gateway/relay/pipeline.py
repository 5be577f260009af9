"""The way of a chat completion: authenticate, read, admit, then the reply does the rest."""

from billing.errors import BillingError
from billing.receipts import Outcome
from gateway.errors import ApiError, to_api_error
from gateway.http1.exchange import Exchange
from gateway.protocols import chat
from gateway.relay.admit import admit, prepare
from gateway.relay.aside import LARGE_BYTES
from gateway.relay.call import Arrival, Call
from gateway.relay.http_in import (
    ClientLeft,
    check_headers,
    note_labels,
    read_body,
    send_error,
)
from gateway.relay.record import record
from gateway.relay.reply import Reply
from gateway.relay.seen import Seen
from gateway.relay.settle import VOID, end_call, finish, wait_settled
from gateway.services import Services
from keys.errors import KeysError

ROUTE = "/v1/chat/completions"


async def chat_completions(services: Services, arrival: Arrival, exchange: Exchange) -> None:
    """Serve one chat completion, or refuse it with the OpenAI envelope."""
    call: Call | None = None
    is_admitted = False
    try:
        call = await _prepared(services, arrival, exchange)
        await admit(services, call)
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


async def _prepared(services: Services, arrival: Arrival, exchange: Exchange) -> Call:
    settings = services.settings
    headers = dict(exchange.headers)
    check_headers(exchange, headers, settings.limits.headers_bytes_max)
    caller = await services.authenticator.authenticate(headers)
    note_labels(arrival, headers)
    limits, timeouts = settings.limits, settings.timeouts
    body = await read_body(
        exchange, headers, limits.body_bytes_max, timeouts.body_s, services.bodies
    )
    if len(body) < LARGE_BYTES:
        facts = chat.read_facts(body)
    else:
        facts = await services.aside.run(lambda: chat.read_facts(body))
    return prepare(services, arrival, caller, facts)


async def _void(services: Services, call: Call) -> None:
    """The till did not say whether the hold is there: one free receipt ends it in any case."""
    # crash-point: void.begin
    settled = end_call(services, call, Outcome.VOIDED, VOID, Seen())
    record(services, call, settled.receipt)
    await wait_settled(settled)
