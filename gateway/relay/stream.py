"""Relay an event stream: frames leave when they came; usage settles the call before [DONE] leaves.

The head waits for the first frame, so that a provider's early failure keeps its status; after ten
seconds of silence it goes out with a comment line.
"""

import time
from typing import TYPE_CHECKING

import msgspec
from msgspec import Raw

from billing.receipts import Outcome
from billing.usage import UsageSource
from gateway.errors import ApiError, upstream_error
from gateway.protocols import sse
from gateway.protocols.chat_answer import replace_usage, usage_for_client, usage_object
from gateway.providers.upstream import UpstreamFailed
from gateway.relay.forward import error_in_answer
from gateway.relay.http_in import Header
from gateway.relay.meter import Piece, PieceKind, StreamMeter
from gateway.relay.settle import VOID, Bill, wait_settled
from gateway.relay.watchdog import DeadlineMissed

if TYPE_CHECKING:
    from gateway.relay.reply import Reply

STREAM_HEADERS: tuple[Header, ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
)


async def relay_stream(reply: "Reply") -> None:
    """Relay to the end. Raises UpstreamFailed or DeadlineMissed only while nothing was sent."""
    await _StreamRelay(reply).run()


class _StreamRelay:
    """One stream on its way."""

    def __init__(self, reply: "Reply") -> None:
        settings = reply.services.settings
        self.reply = reply
        self.client = reply.client
        self.timeouts = settings.timeouts
        self.drain_bytes_max = settings.limits.drain_bytes_max
        self.wants_usage = reply.call.facts.wants_usage
        self.meter = StreamMeter(buffer_bytes_max=settings.limits.stream_buffer_bytes_max)
        self.bill: Bill | None = None
        self.usage_sent = False
        self.drained = 0
        reply.seen = self.meter.seen

    async def run(self) -> None:
        try:
            while chunk := await self._next_chunk():
                for piece in self.meter.feed(chunk):
                    await self._deliver(piece)
                if self.meter.is_done:
                    return
                if self.client.gone:
                    self.drained += len(chunk)
                    if self.drained > self.drain_bytes_max:
                        return
            await self._end_without_done()
        except (UpstreamFailed, DeadlineMissed) as exc:
            if self.client.gone or not self.client.head_sent:
                raise
            await self._broke_off(exc)

    async def _next_chunk(self) -> bytes:
        """The next bytes; while there are none, a comment line from time to time."""
        reply, upstream = self.reply, self.reply.upstream
        assert upstream is not None
        began = time.monotonic()
        silent_s = 0.0
        while True:
            left_s = self.timeouts.upstream_chunk_s - silent_s
            try:
                chunk = await reply.dog.wait(
                    upstream.read(), min(self.timeouts.keepalive_comment_s, left_s)
                )
            except DeadlineMissed:
                silent_s = time.monotonic() - began
                if reply.dog.is_over or silent_s >= self.timeouts.upstream_chunk_s:
                    raise
                if not self.meter.is_mid_frame:
                    await self._write(sse.KEEPALIVE)
                continue
            reply.call.upstream_wait_s += time.monotonic() - began
            if reply.call.first_byte_at is None:
                reply.call.first_byte_at = time.time()
            return chunk

    async def _deliver(self, piece: Piece) -> None:
        match piece.kind:
            case PieceKind.PLAIN:
                await self._write(piece.data)
            case PieceKind.USAGE:
                await self._deliver_usage(piece)
            case PieceKind.ERROR:
                await self._deliver_error(piece)
            case PieceKind.DONE:
                await self._settle(Outcome.COMPLETE)
                await self._end(b"")

    async def _deliver_usage(self, piece: Piece) -> None:
        """The provider's last word on usage: settle now, SDKs may hang up after [DONE]."""
        if self.bill is not None or self.usage_sent:
            return  # a second one changes nothing
        if self.meter.seen.report is None or self.meter.seen.report.usage is None:
            return  # it makes no sense: count at the end
        await self._settle(Outcome.COMPLETE)
        if self.wants_usage:
            assert piece.answer is not None
            self.usage_sent = True
            new = self._usage(piece.answer.usage)
            await self._write(replace_usage(piece.data, piece.answer.usage, new))

    async def _settle(self, outcome: Outcome) -> None:
        if self.bill is None:
            self.bill = await self.reply.bill()
            await wait_settled(self.reply.settle(outcome, self.bill))

    async def _end_without_done(self) -> None:
        """A proper end of the body without [DONE]: some providers never send it."""
        for piece in self.meter.end():
            await self._deliver(piece)
        if self.meter.is_done:
            return
        if not self.meter.seen.bytes:
            raise UpstreamFailed("the answer was empty", may_have_billed=True)
        await self._settle(Outcome.COMPLETE)
        await self._end(b"")

    async def _deliver_error(self, piece: Piece) -> None:
        """The provider says that it failed. Before anything was sent it is a proper error."""
        error = error_in_answer(sse.payload_of(piece.data))
        assert error is not None
        if not self.client.head_sent and not self.client.gone and self.bill is None:
            await self.reply.fail(error, Outcome.UPSTREAM_FAILED)
            return
        await self._end_failed(error)

    async def _broke_off(self, exc: Exception) -> None:
        if isinstance(exc, UpstreamFailed):
            await self._end_failed(upstream_error(f"The provider failed: {exc.reason}."))
        else:
            message = "The provider stopped sending."
            await self._end_failed(upstream_error(message, code="upstream_timeout"))

    async def _end_failed(self, error: ApiError) -> None:
        """One frame with the error and without choices (an SDK swallows it otherwise)."""
        if self.bill is None:
            bill = await self.reply.bill()
            # Nothing was delivered, nothing is guessed: only the provider's own word counts.
            if bill.usage_source is UsageSource.COUNTED and not bill.usage.output_tokens:
                bill = VOID
            self.bill = bill
            await wait_settled(self.reply.settle(Outcome.UPSTREAM_FAILED, bill))
        self.reply.code = error.code
        error.message += f" {self._charged()}"
        frame = error.body(f"req_{self.reply.call.request_id}")
        await self._end(b"data: " + frame + b"\n\n", with_usage=False)

    def _charged(self) -> str:
        receipt_id = f"rcpt_{self.reply.call.request_id}"
        if self.bill is None or not self.bill.charge.price_nanos:
            return f"You were not charged (receipt {receipt_id})."
        return f"You were charged for what was delivered (receipt {receipt_id})."

    async def _end(self, last: bytes, *, with_usage: bool = True) -> None:
        """[DONE] and the end of the response, at once: async SDKs drain the body after it."""
        if with_usage and self.wants_usage and not self.usage_sent:
            last += self._usage_frame()
        await self._write(last + sse.DONE_FRAME, more=False)

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        if not self.client.head_sent:
            await self.client.head(200, (*STREAM_HEADERS, *self.reply.id_headers()))
        await self.client.body(data, more=more)

    def _usage(self, provider_usage: Raw) -> bytes:
        assert self.bill is not None
        receipt_id = f"rcpt_{self.reply.call.request_id}"
        return usage_for_client(provider_usage, self.bill.charge.price_nanos, receipt_id)

    def _usage_frame(self) -> bytes:
        """A usage chunk for a client that asked, when the provider sent none of its own."""
        assert self.bill is not None
        seen = self.meter.seen
        raw = seen.usage_raw if seen.usage_raw is not None else usage_object(self.bill.usage)
        if self.bill.usage_source is UsageSource.COUNTED:
            raw = usage_object(self.bill.usage)
        chunk = {
            "id": seen.upstream_id or f"chatcmpl-{self.reply.call.request_id}",
            "object": "chat.completion.chunk",
            "created": int(self.reply.call.arrival.started_at),
            "model": seen.model or self.reply.call.facts.model,
            "choices": [],
            "usage": Raw(self._usage(raw)),
        }
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"
