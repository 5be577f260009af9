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
from gateway.errors import NOT_CHARGED, ApiError, upstream_error
from gateway.protocols import sse
from gateway.protocols.chat_answer import usage_for_client, usage_object, with_usage
from gateway.providers.upstream import UpstreamFailed
from gateway.relay.forward import error_in_answer
from gateway.relay.http_in import Header
from gateway.relay.meter import Piece, PieceKind, StreamMeter
from gateway.relay.settle import VOID, Bill, wait_settled
from gateway.relay.watchdog import DeadlineMissed

if TYPE_CHECKING:
    from gateway.relay.reply import Reply

# How long and how far to read on after [DONE]; many servers send the end of the body separately.
READ_OUT_S = 0.1
READ_OUT_BYTES_MAX = 16 * 1024
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
        self.usage_piece: Piece | None = None
        self.drained = 0
        reply.seen = self.meter.seen

    async def run(self) -> None:
        try:
            while chunk := await self._next_chunk():
                for piece in self.meter.feed(chunk):
                    await self._deliver(piece)
                if self.meter.is_done:
                    await self._read_out()
                    return
                if self.client.gone:
                    self.drained += len(chunk)
                    if self.drained > self.drain_bytes_max:
                        return
            await self._end_without_done()
        except (UpstreamFailed, DeadlineMissed) as exc:
            if self.usage_piece is not None:
                await self._complete()  # all of the answer came, only its [DONE] did not
            elif self.client.gone or not self.client.head_sent:
                raise
            else:
                await self._broke_off(exc)

    async def _read_out(self) -> None:
        """The few bytes after [DONE]: a connection that is at its end can be used again."""
        upstream = self.reply.upstream
        assert upstream is not None
        size = 0
        try:
            while chunk := await self.reply.dog.wait(upstream.read(), READ_OUT_S):
                size += len(chunk)
                if size > READ_OUT_BYTES_MAX:
                    return
        except (UpstreamFailed, DeadlineMissed):
            return

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
                # Kept until the end: some providers correct themselves, and the price goes into it.
                self.usage_piece = piece
            case PieceKind.ERROR:
                await self._deliver_error(piece)
            case PieceKind.DONE:
                await self._complete()

    async def _complete(self) -> None:
        """The whole answer came: settle, then tell the client what it cost and that it ended."""
        bill = await self.reply.bill()
        await wait_settled(self.reply.settle(Outcome.COMPLETE, bill))
        await self._end(self._usage_frame(bill) if self.wants_usage else b"")

    async def _end_without_done(self) -> None:
        """A proper end of the body without [DONE]: some providers never send it."""
        for piece in self.meter.end():
            await self._deliver(piece)
        if self.meter.is_done:
            return
        if self.meter.seen.is_empty:
            raise UpstreamFailed("the answer was empty", may_have_billed=True)
        await self._complete()

    async def _deliver_error(self, piece: Piece) -> None:
        """The provider says that it failed. Before anything was sent it is a proper error."""
        error = error_in_answer(sse.payload_of(piece.data))
        assert error is not None
        if not self.client.head_sent and not self.client.gone:
            error.message += f" {NOT_CHARGED}"
            await self.reply.fail(error, Outcome.VOIDED)
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
        bill = await self.reply.bill()
        # Nothing was delivered, nothing is guessed: only the provider's own word counts.
        if bill.usage_source is UsageSource.COUNTED and not bill.usage.output_tokens:
            bill = VOID
        await wait_settled(self.reply.settle(Outcome.UPSTREAM_FAILED, bill))
        self.reply.code = error.label
        receipt_id = f"receipt rcpt_{self.reply.call.request_id}"
        if bill.charge.price_nanos:
            error.message += f" You were charged for what was delivered ({receipt_id})."
        else:
            error.message += f" {NOT_CHARGED[:-1]} ({receipt_id})."
        frame = b"data: " + error.body(f"req_{self.reply.call.request_id}") + b"\n\n"
        await self._end(b"\n\n" + frame if self.meter.is_mid_frame else frame)

    async def _end(self, last: bytes) -> None:
        """[DONE] and the end of the response, at once: async SDKs drain the body after it."""
        await self._write(last + sse.DONE_FRAME, more=False)

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        if not self.client.head_sent:
            await self.client.head(200, (*STREAM_HEADERS, *self.reply.id_headers()))
        await self.client.body(data, more=more)

    def _usage_frame(self, bill: Bill) -> bytes:
        """The usage chunk for a client that asked: the provider's own, or one in its manner."""
        seen, call, piece = self.meter.seen, self.reply.call, self.usage_piece
        counted = bill.usage_source is UsageSource.COUNTED
        raw = usage_object(bill.usage) if counted else seen.usage_raw
        assert raw is not None
        usage = usage_for_client(raw, bill.charge.price_nanos, f"rcpt_{call.request_id}")
        if piece is not None and piece.answer is not None:
            payload = sse.payload_of(piece.data)
            new = with_usage(payload, piece.answer, usage)
            return sse.with_payload(piece.data, payload, new)
        chunk = {
            "id": seen.upstream_id or f"chatcmpl-{call.request_id}",
            "object": "chat.completion.chunk",
            "created": int(call.arrival.started_at),
            "model": seen.model or call.facts.model,
            "choices": [],
            "usage": Raw(usage),
        }
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"
