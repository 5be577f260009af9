"""Stage 5: end a call with one receipt. Begun without an await, so that nothing can come between.

`finish` is for the ways in which a request ends badly: whatever cancels the caller, the coroutine
given to it runs to its end.
"""

import asyncio
import logging
from collections.abc import Coroutine
from decimal import Decimal
from functools import partial
from typing import Any, TypeVar

import anyio
import msgspec

from billing.errors import BillingError
from billing.prices import NOTHING, Charge, charge_for
from billing.receipts import Outcome
from billing.settler import Settled
from billing.tokens import CHARS_PER_TOKEN, TokenCounter
from billing.usage import Usage, UsageSource, is_believable
from gateway.protocols.chat import prompt_text
from gateway.relay.call import Call
from gateway.relay.seen import Seen
from gateway.services import Services

log = logging.getLogger("gateway.relay")
T = TypeVar("T")

# How long an answer waits for Postgres when the till is silent. The receipt is safe either way.
COMMIT_WAIT_S = 1.0
# And then for the disk, when neither has it.
SPOOL_WAIT_S = 0.5


class Bill(msgspec.Struct, frozen=True, kw_only=True):
    """What a call is charged and why."""

    usage: Usage
    usage_source: UsageSource
    charge: Charge


VOID = Bill(usage=Usage(), usage_source=UsageSource.NONE, charge=NOTHING)


def bill_reported(call: Call, seen: Seen, header_usd: Decimal | None) -> Bill | None:
    """The bill by what the provider said; None when it gave no counts that can be believed.

    An explicit zero is a value: a provider that counted nothing is believed.
    """
    usage = seen.report.usage if seen.report is not None else None
    if usage is None:
        return None
    if not is_believable(usage, call.input_ceiling, seen.bytes, call.output_max):
        facts = {"request_id": call.request_id, "provider": call.route.provider}
        log.error("usage.rejected", extra=facts)
        # A cost that came with absurd counts is not believed either.
        seen.report = None
        return None
    return _bill(call, usage, UsageSource.PROVIDER, _reported_usd(call, seen, header_usd))


async def bill_counted(
    call: Call, seen: Seen, header_usd: Decimal | None, counter: TokenCounter
) -> Bill:
    """The bill by our own count of what was asked and of what came."""
    said = seen.text()
    usage = Usage(
        input_tokens=await counter.count(lambda: prompt_text(call.facts)),
        output_tokens=await counter.count(lambda: said) + seen.chars_beyond // CHARS_PER_TOKEN,
    )
    return _bill(call, usage, UsageSource.COUNTED, _reported_usd(call, seen, header_usd))


def charged_again(call: Call, bill: Bill) -> Bill:
    """The same bill, by what the call holds now."""
    return _bill(call, bill.usage, bill.usage_source, bill.charge.reported_usd)


def _reported_usd(call: Call, seen: Seen, header_usd: Decimal | None) -> Decimal | None:
    if not call.route.reported_cost:
        return None
    in_usage = seen.report.reported_usd if seen.report is not None else None
    return header_usd if in_usage is None else in_usage


def _bill(call: Call, usage: Usage, source: UsageSource, reported: Decimal | None) -> Bill:
    charge = charge_for(usage, call.rates, reported, call.model.markup_bps, call.hold_nanos)
    return Bill(usage=usage, usage_source=source, charge=charge)


def end_call(services: Services, call: Call, outcome: Outcome, bill: Bill, seen: Seen) -> Settled:
    """Hand the call's one receipt over to till and book. Synchronous: it cannot be interrupted."""
    assert call.is_open
    usage, charge = bill.usage, bill.charge
    receipt = call.end_receipt(outcome)
    receipt.served_model = seen.model
    receipt.upstream_id = seen.upstream_id
    receipt.upstream_request_id = call.upstream_request_id
    receipt.input_tokens = usage.input_tokens
    receipt.output_tokens = usage.output_tokens
    receipt.cached_tokens = usage.cached_tokens
    receipt.cache_write_tokens = usage.cache_write_tokens
    receipt.reasoning_tokens = usage.reasoning_tokens
    receipt.audio_input_tokens = usage.audio_input_tokens
    receipt.audio_output_tokens = usage.audio_output_tokens
    receipt.usage_source = bill.usage_source
    receipt.reported_cost_usd = charge.reported_usd
    receipt.provider_cost_nanos = charge.cost_nanos
    receipt.price_nanos = charge.price_nanos
    receipt.overrun_nanos = charge.overrun_nanos
    receipt.cost_source = charge.cost_source
    settled = services.settler.submit(call.scopes, call.request_id, receipt)
    call.is_open = False
    seen.release()
    return settled


async def wait_settled(services: Services, settled: Settled) -> int | None:
    """Wait until the receipt is safe; the account's available nanos if the till told.

    In the till, else in the book, else in the spool; after little more than a second it is none of
    them and the answer goes on all the same: the settler has it for as long as this worker lives.
    """
    try:
        reply = await _untouched(settled.till_reply)
    except BillingError:
        await _wait_kept(services, settled)
        return None
    # crash-point: settle.answered
    return int(reply[1])


async def _wait_kept(services: Services, settled: Settled) -> None:
    try:
        async with asyncio.timeout(COMMIT_WAIT_S):
            await asyncio.shield(settled.committed)
    except (TimeoutError, BillingError):
        spool = services.spool
        is_kept = spool is not None and await spool.keep(settled, SPOOL_WAIT_S)
        facts = {"request_id": settled.request_id, "spooled": is_kept}
        log.warning("settle.unanswered", extra=facts)


async def _untouched(future: asyncio.Future[T]) -> T:
    """The result of a future that outlives us: whatever cancels us does not cancel it.

    asyncio.shield does the same with twice the work; the settler waits for this very future before
    it confirms.
    """
    if not future.done():
        waiter = asyncio.get_running_loop().create_future()
        future.add_done_callback(partial(_wake, waiter))
        await waiter
    return future.result()


def _wake(waiter: asyncio.Future[None], _: object) -> None:
    if not waiter.done():
        waiter.set_result(None)


async def finish(coro: Coroutine[Any, Any, T]) -> T:
    """Run coro to its end whatever cancels the caller, then let the cancellation go on.

    Both shields are needed: anyio scopes cancel again at every await, plain `task.cancel()` may
    come more than once. coro must have deadlines of its own.
    """
    with anyio.CancelScope(shield=True):
        task = asyncio.ensure_future(coro)
        cancelled: asyncio.CancelledError | None = None
        while not task.done():
            try:
                await asyncio.wait({task})  # wait() never cancels what it waits for
            except asyncio.CancelledError as exc:
                cancelled = exc
    if cancelled is not None:
        raise cancelled from (None if task.cancelled() else task.exception())
    return task.result()
