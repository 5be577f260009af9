"""Relay an event stream: frames leave when they came; usage settles the call before [DONE] leaves.

The head waits for the first frame, so that a provider's early failure keeps its status; after ten
seconds of silence it goes out with a comment line.
"""

import asyncio
import time
from typing import TYPE_CHECKING

from billing.receipts import Outcome
from billing.usage import UsageSource
from gateway.errors import NOT_CHARGED, ApiError, upstream_error
from gateway.http1.exchange import Header
from gateway.protocols import sse
from gateway.protocols.chat_answer import usage_for_client, usage_object, with_usage
from gateway.protocols.chat_end import Envelope, length_frames
from gateway.providers.upstream import UpstreamFailed
from gateway.relay.forward import error_in_answer
from gateway.relay.growth import Growth
from gateway.relay.meter import Piece, PieceKind, StreamMeter
from gateway.relay.settle import VOID, Bill, bill_counted, wait_settled
from gateway.relay.watchdog import DeadlineMissed

if TYPE_CHECKING:
    from gateway.relay.reply import Reply

# A larger chunk is looked at in parts, and others have their turn in between.
TURN_BYTES = 16 * 1024
# How long and how far to read on after [DONE]; many servers send the end of the body separately.
READ_OUT_S = 0.1
READ_OUT_BYTES_MAX = 16 * 1024
# What a client is told whose request a sweeper ended while its worker stood still.
LOST = "The gateway stood still for too long and ended this request."
STREAM_HEADERS: tuple[Header, ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
)


async def relay_stream(reply: "Reply") -> None:
    """Relay to the end. Raises UpstreamFailed or DeadlineMissed only while nothing was sent."""
    await _StreamRelay(reply).run()


class _StreamRelay:
    """One stream on its way.

    While nothing but plain frames comes and the client keeps up, `_take` passes them on as they
    arrive and this task sleeps: waking it for each would cost more than the frame.
    """

    def __init__(self, reply: "Reply") -> None:
        settings = reply.services.settings
        self.reply = reply
        self.client = reply.client
        self.timeouts = settings.timeouts
        self.silence_s = min(self.timeouts.keepalive_comment_s, self.timeouts.upstream_chunk_s)
        self.drain_bytes_max = settings.limits.drain_bytes_max
        self.wants_usage = reply.call.facts.wants_usage
        self.meter = StreamMeter(buffer_bytes_max=settings.limits.stream_buffer_bytes_max)
        self.usage_piece: Piece | None = None
        self.drained = 0
        self.pieces: list[Piece] = []
        self.ahead = b""
        self.dog = reply.dog
        self.began_at = self.last_at = self.dog.now()
        self.seen = reply.seen = self.meter.seen
        self.growth = Growth(reply, self.seen)

    async def run(self) -> None:
        try:
            while await self._pump():
                await self._deliver_all()
                if self.growth.is_exhausted:
                    await self._stop()
                    return
                if self.meter.is_done:
                    await self._read_out()
                    return
                if self.drained > self.drain_bytes_max:
                    return
                if self.client.exchange.is_blocked:
                    await self.client.drained()
            await self._end_without_done()
        except (UpstreamFailed, DeadlineMissed) as exc:
            if self.usage_piece is not None:
                await self._complete()  # all of the answer came, only its [DONE] did not
            elif self.client.gone or not self.client.head_sent:
                raise
            else:
                await self._broke_off(exc)

    def _take(self, chunk: bytes) -> bool:
        """Pass on what came; False when the task must look after it.

        The rest is in `pieces` then, or in `ahead`.
        """
        if len(chunk) > TURN_BYTES:
            self.ahead += chunk
            return False
        exchange = self.client.exchange
        self.last_at = self.dog.extend(self.silence_s)
        call = self.reply.call
        if call.first_byte_at is None:
            call.first_byte_at = time.time()
            # crash-point: stream.first
            call.upstream_wait_s += self.last_at - self.began_at
        if exchange.is_started and not exchange.gone and self.meter.is_plain(chunk):
            if self.seen.bytes < self.growth.look_at or self.growth.glance():
                exchange.write(chunk)
                # crash-point: stream.passed
                return not exchange.is_blocked
            self.pieces = [Piece(PieceKind.PLAIN, chunk)]
            return False
        if exchange.gone:
            self.drained += len(chunk)
        self.pieces = self.meter.feed(chunk)
        return not self.pieces and self.drained <= self.drain_bytes_max

    async def _pump(self) -> bool:
        """Relay until the task has something to do (True) or the body has ended (False).

        While nothing comes, a comment line leaves from time to time.
        """
        upstream, chunk_s = self.reply.upstream, self.timeouts.upstream_chunk_s
        assert upstream is not None
        while self.ahead:
            # Where the whole call's deadline is seen when there is always more.
            await self.dog.wait(asyncio.sleep(0), chunk_s)
            part, self.ahead = self.ahead[:TURN_BYTES], self.ahead[TURN_BYTES:]
            if not self._take(part):
                return True
        self.began_at = self.last_at = self.dog.now()
        while True:
            left_s = chunk_s - (self.dog.now() - self.last_at)
            try:
                return await self.dog.wait(upstream.pump(self._take), min(self.silence_s, left_s))
            except (UpstreamFailed, DeadlineMissed) as exc:
                if self.pieces or self.ahead:
                    return True  # they came before it
                if isinstance(exc, UpstreamFailed):
                    raise
                if self.dog.is_over or self.dog.now() - self.last_at >= chunk_s:
                    raise
                if not self.meter.is_mid_frame:
                    await self._write(sse.KEEPALIVE)

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

    async def _deliver_all(self) -> None:
        pieces, self.pieces = self.pieces, []
        if self.seen.bytes >= self.growth.look_at and pieces and not self.client.gone:
            pieces = await self.growth.look(pieces)
        for piece in pieces:
            await self._deliver(piece)

    async def _stop(self) -> None:
        """Nothing more can be paid: the stream ends like one that reached its length."""
        reply, seen, facts = self.reply, self.seen, self.reply.call.facts
        assert reply.upstream is not None
        reply.upstream.close()
        # What a provider says in the middle is not about what was delivered.
        seen.report = None
        bill = await bill_counted(reply.call, seen, None, reply.services.counter)
        await wait_settled(self.reply.services, reply.settle(Outcome.CREDIT_EXHAUSTED, bill))
        indexes = [index for index in range(facts.choices) if index not in seen.finished]
        frames = length_frames(self._envelope(), indexes, wants_usage=self.wants_usage)
        last = frames + (self._usage_frame(bill) if self.wants_usage else b"")
        await self._end(b"\n\n" + last if self.meter.is_mid_frame else last)

    async def _deliver(self, piece: Piece) -> None:
        match piece.kind:
            case PieceKind.PLAIN:
                await self._write(piece.data)
            case PieceKind.USAGE:
                # Kept until the end: some providers correct themselves, and the price goes into it.
                self.usage_piece = piece
                # crash-point: stream.usage
            case PieceKind.ERROR:
                await self._deliver_error(piece)
            case PieceKind.DONE:
                await self._complete()

    async def _complete(self) -> None:
        """The whole answer came: settle, then tell the client what it cost and that it ended."""
        # crash-point: stream.complete
        bill = await self.reply.bill()
        settled = self.reply.settle(Outcome.COMPLETE, bill)
        await wait_settled(self.reply.services, settled)
        await self._end(self._usage_frame(bill) if self.wants_usage else b"")

    async def _end_without_done(self) -> None:
        """A proper end of the body without [DONE]: some providers never send it."""
        for piece in self.meter.end():
            await self._deliver(piece)
        if self.meter.is_done:
            return
        if self.seen.is_empty:
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
        elif self.reply.call.is_taken:
            await self._end_failed(upstream_error(LOST))
        else:
            message = "The provider stopped sending."
            await self._end_failed(upstream_error(message, code="upstream_timeout"))

    async def _end_failed(self, error: ApiError) -> None:
        """One frame with the error and without choices (an SDK swallows it otherwise)."""
        bill = await self.reply.bill()
        # Nothing was delivered, nothing is guessed: only the provider's own word counts.
        if bill.usage_source is UsageSource.COUNTED and not bill.usage.output_tokens:
            bill = VOID
        settled = self.reply.settle(Outcome.UPSTREAM_FAILED, bill)
        await wait_settled(self.reply.services, settled)
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
        self._start()
        self.client.last(last + sse.DONE_FRAME)
        # crash-point: stream.done

    async def _write(self, data: bytes) -> None:
        self._start()
        await self.client.body(data)

    def _start(self) -> None:
        if not self.client.head_sent:
            self.client.head(200, (*STREAM_HEADERS, *self.reply.id_headers()))

    def _usage_frame(self, bill: Bill) -> bytes:
        """The usage chunk for a client that asked: the provider's own, or one in its manner."""
        seen, call, piece = self.seen, self.reply.call, self.usage_piece
        counted = bill.usage_source is UsageSource.COUNTED
        raw = usage_object(bill.usage) if counted else seen.usage_raw
        assert raw is not None
        usage = usage_for_client(raw, bill.charge.price_nanos, f"rcpt_{call.request_id}")
        if piece is not None and piece.answer is not None:
            payload = sse.payload_of(piece.data)
            new = with_usage(payload, piece.answer, usage)
            return sse.with_payload(piece.data, payload, new)
        return self._envelope().frame([], usage)

    def _envelope(self) -> Envelope:
        seen, call = self.seen, self.reply.call
        return Envelope(
            id=seen.upstream_id or f"chatcmpl-{call.request_id}",
            created=int(call.arrival.started_at),
            model=seen.model or call.facts.model,
        )
