"""The answer to one admitted call. It owns the hold from admission until the receipt is settled.

Whatever happens - the client leaves while we wait for the provider or for its socket, the provider
fails at any point, the task is cancelled - the call ends with exactly one receipt, handed to till
and book before `__call__` returns.
Failure: every way a provider can fail becomes an error the client understands, and a receipt.
"""

import asyncio
import time
from decimal import Decimal
from functools import cached_property

from billing.errors import TillUnavailable
from billing.receipts import Outcome
from billing.settler import Settled
from gateway.errors import NOT_CHARGED, ApiError, to_api_error, upstream_error
from gateway.http1.exchange import Exchange, Header
from gateway.providers.upstream import UpstreamFailed, UpstreamReply
from gateway.rate_headers import rate_headers
from gateway.relay.body import relay_body
from gateway.relay.call import Call
from gateway.relay.client import Client
from gateway.relay.forward import cost_in_header, forward, note_failure, read_error
from gateway.relay.growth import pay_in_full
from gateway.relay.http_in import CORS, JSON
from gateway.relay.progress import Progress
from gateway.relay.record import record
from gateway.relay.seen import Seen
from gateway.relay.settle import (
    VOID,
    Bill,
    bill_counted,
    bill_reported,
    end_call,
    finish,
    wait_settled,
)
from gateway.relay.stream import LOST, relay_stream
from gateway.relay.watchdog import DeadlineMissed, Watchdog
from gateway.services import Services


class Reply:
    """The answer to one call; used once."""

    def __init__(self, services: Services, call: Call) -> None:
        self.services = services
        self.call = call
        self.seen = Seen()
        self.header_usd: Decimal | None = None
        self.upstream: UpstreamReply | None = None
        self.client: Client
        self.dog: Watchdog
        self.code = ""
        self._is_draining = False
        self._is_cut_off = False
        self.renewed_at = services.dogs.now()

    @cached_property
    def progress(self) -> Progress:
        """What was counted of the answer: most requests are over before anybody counts."""
        return Progress(self.call)

    async def __call__(self, exchange: Exchange) -> None:
        timeouts = self.services.settings.timeouts
        self.dog = self.services.dogs.watch(timeouts.request_total_s)
        self.services.replies.add(self)
        try:
            self.client = Client(exchange, self.dog, timeouts.write_stall_s, self._client_left)
            await self._relay()
        except asyncio.CancelledError:
            self._is_cut_off = True
            raise
        finally:
            try:
                if self.call.is_open:
                    await finish(self._end_anyhow())
            finally:
                self._let_go()

    async def _relay(self) -> None:
        try:
            self.upstream = await forward(self.services, self.call, self.dog, self.client)
            if not 200 <= self.upstream.status < 300:
                await self.fail(
                    await read_error(self.upstream, self.dog, self.call), Outcome.VOIDED
                )
                return
            self.header_usd = cost_in_header(self.upstream)
            content_type = (self.upstream.header("content-type") or "").lower()
            if content_type.startswith("text/event-stream"):
                await relay_stream(self)
            else:
                await relay_body(self)
        except UpstreamFailed as exc:
            await self._upstream_failed(exc)
        except DeadlineMissed:
            await self._too_late()
        except TillUnavailable as exc:
            if self.client.head_sent:
                raise
            await self.fail(to_api_error(exc), Outcome.VOIDED)

    async def _upstream_failed(self, exc: UpstreamFailed) -> None:
        reason = "broke_off" if exc.may_have_billed else "no_connection"
        note_failure(self.services, self.call, reason, exc.reason)
        if self.client.gone and (self.client.head_sent or self.seen.text()):
            self._is_cut_off = True  # what came before it failed is charged
            return
        outcome = Outcome.UPSTREAM_FAILED if exc.may_have_billed else Outcome.VOIDED
        message = f"The provider failed: {exc.reason}. {NOT_CHARGED}"
        await self.fail(upstream_error(message, may_have_billed=exc.may_have_billed), outcome)

    async def _too_late(self) -> None:
        if self.client.gone:
            self._is_cut_off = True
            return
        if self.call.is_taken:
            # Not the provider's fault, and none of its failures.
            exc = upstream_error(f"{LOST} {NOT_CHARGED}", status=503, may_have_billed=True)
            await self.fail(exc, Outcome.UPSTREAM_FAILED)
            return
        note_failure(self.services, self.call, "timeout", "no answer in time")
        message = f"The provider did not answer in time. {NOT_CHARGED}"
        exc = upstream_error(message, status=504, code="upstream_timeout", may_have_billed=True)
        await self.fail(exc, Outcome.UPSTREAM_FAILED)

    async def fail(self, exc: ApiError, outcome: Outcome) -> None:
        """End the call free of charge and answer with an error. Only before any of the answer."""
        assert not self.client.head_sent
        self.code = exc.label
        await wait_settled(self.services, self.settle(outcome, VOID))
        # crash-point: fail.settled
        request_id = f"req_{self.call.request_id}"
        body = exc.body(request_id)
        length = (b"content-length", b"%d" % len(body))
        headers = [JSON, length, *self.id_headers(), *exc.headers]
        self.client.head(exc.status, headers)
        self.client.last(body)

    async def bill(self) -> Bill:
        """What the provider reported, else our own count of what came; held for if it can be."""
        call, seen = self.call, self.seen
        bill = bill_reported(call, seen, self.header_usd)
        if bill is None:
            bill = await bill_counted(call, seen, self.header_usd, self.services.counter)
        if bill.charge.overrun_nanos and call.hold_nanos < call.hold_max_nanos:
            return await pay_in_full(self.services.till, call, bill)
        return bill

    def settle(self, outcome: Outcome, bill: Bill) -> Settled:
        """End the call: one receipt, on its way to till and book when this returns."""
        if self.client.gone and outcome is Outcome.COMPLETE:
            outcome = Outcome.CLIENT_LEFT
        settled = end_call(self.services, self.call, outcome, bill, self.seen)
        record(self.services, self.call, settled.receipt)
        return settled

    async def _end_anyhow(self) -> None:
        """The client left or the task was cancelled: charge what the provider did until now.

        Anything else is a bug of ours, and nobody pays for that.
        """
        outcome, bill = Outcome.UPSTREAM_FAILED, VOID
        try:
            if not self.call.is_sent:
                outcome = Outcome.VOIDED
                return
            # Text that was delivered is paid for, whatever went wrong behind it.
            was_delivered = self.client.head_sent and self.seen.text()
            if self._is_cut_off or self.client.gone or was_delivered:
                outcome = Outcome.CLIENT_LEFT
                bill = await self.bill()
        finally:
            # crash-point: left.settling
            await wait_settled(self.services, self.settle(outcome, bill))

    def lose_hold(self) -> None:
        """Somebody took us for dead and ended this call in the book: stop, at what came."""
        self.call.is_taken = True
        self.dog.shorten(0)

    def _client_left(self) -> None:
        """Read the provider on for its usage, but not for long, and not for too many at once."""
        # crash-point: left.noticed
        services = self.services
        if services.drains >= services.settings.limits.drains_max:
            self.dog.shorten(0)
            return
        self._is_draining = True
        services.drains += 1
        self.dog.shorten(services.settings.timeouts.drain_s)

    def _let_go(self) -> None:
        services = self.services
        services.replies.discard(self)
        services.drains -= self._is_draining
        self.dog.stop()
        if self.upstream is not None:
            self.upstream.close()
        self.client.forget()

    def id_headers(self) -> list[Header]:
        """Ids and our own share of the time, on every answer."""
        call = self.call
        spent_s = time.monotonic() - call.arrival.started_mono
        overhead_s = max(spent_s - call.upstream_wait_s, 0)
        self.services.metrics.overhead.observe(overhead_s)
        request_id = call.request_id.encode()
        headers: list[Header] = [
            (b"x-request-id", b"req_" + request_id),
            (b"x-receipt-id", b"rcpt_" + request_id),
            (b"x-farebox-overhead-ms", b"%.2f" % (overhead_s * 1000)),
            *CORS,
        ]
        if call.lowered_to is not None:
            headers.append((b"x-farebox-max-tokens", b"%d" % call.lowered_to))
        if call.standings is not None:
            headers += rate_headers(call.standings)
        return headers
