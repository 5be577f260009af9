"""How far a stream may go on what is held for it, and the next window of hold in time.

Nothing is done for a chunk but one comparison: `look_at` says at how many bytes of the stream it
is looked at again. A glance bounds the tokens by the bytes of the text; they are counted only near
the places where something has to happen: half of the last window, three quarters, the end.
Failure: a till that does not answer is asked again at every look. Meanwhile the stream goes on, at
the operator's risk: up to the most that the request may cost, and no longer than a request takes.
"""

import asyncio
from typing import TYPE_CHECKING

from billing.errors import BillingError
from billing.quote import hold_for, output_covered
from billing.till import Till
from billing.till_wire import Renewal
from billing.tokens import CHARS_PER_TOKEN, count_tokens, is_ready
from gateway.protocols import sse
from gateway.protocols.chat_answer import read_answer, texts_in
from gateway.protocols.chat_end import finished_choices
from gateway.relay.afford import count_prompt
from gateway.relay.call import Call
from gateway.relay.meter import Piece, PieceKind
from gateway.relay.settle import Bill, charged_again

if TYPE_CHECKING:
    from gateway.relay.reply import Reply
    from gateway.relay.seen import Seen

NEVER = 2**62
# Between two looks: should the stream suddenly carry more text in its bytes than until now.
LOOK_BYTES_MAX = 32 * 1024
# Counted at once: going to a thread and back takes about as long.
SHORT_CHARS = 1024
# What is available may change between two answers of the till.
ASKS_MAX = 4
# Parts of a window. Less credit than the smallest is not worth going on for.
HALF, QUARTER, PIECE = 2, 4, 16


class Growth:
    """The hold of one stream, in output tokens of all its choices together."""

    def __init__(self, reply: "Reply", seen: "Seen") -> None:
        self._reply = reply
        self._call = call = reply.call
        self._seen = seen
        self.is_exhausted = False
        """The stream has come to the end of what is held, and there is no more."""
        self.look_at = NEVER
        if call.hold_nanos < call.hold_max_nanos:
            self._window = call.model.stream_window_tokens * call.facts.choices
            self._looked_at = self._looked_text = 0
            # No text has more tokens than the frames that bring it have bytes.
            self.look_at = max(self._window // HALF, 1)

    def glance(self) -> bool:
        """Look at what came; True when the stream may go on for a while without a `look`."""
        self._seen.fold()
        tokens = self._tokens_most()
        if tokens > self._place(HALF):
            return False
        self._plan(tokens)
        return True

    async def look(self, pieces: list[Piece]) -> list[Piece]:
        """What of these pieces may be delivered: all of them, unless the stream is at its end.

        pieces: the last of what came, not delivered yet.
        """
        kinds = [piece.kind for piece in pieces]
        if PieceKind.PLAIN not in kinds or PieceKind.ERROR in kinds or self.glance():
            return pieces
        await self._count()
        tokens = self._tokens_most()
        await self._want_more(tokens)
        if self.is_exhausted:
            return self._cut(pieces, tokens - self._covered())
        self._plan(tokens)
        return pieces

    def _tokens_most(self) -> int:
        """Output tokens that came, at most: what was counted, and the text that was not.

        Of that at most one for each byte, and hardly twice as many as the text before it had.
        """
        progress, seen = self._reply.progress, self._seen
        rest = seen.text_bytes - progress.text_bytes
        if progress.text_bytes:
            rest = min(rest, 2 * rest * progress.tokens // progress.text_bytes + 1)
        return progress.tokens + rest + seen.chars_beyond // CHARS_PER_TOKEN

    def _covered(self) -> int:
        """Output tokens that the hold pays, beside the prompt and what is billed unseen."""
        call, facts = self._call, self._call.facts
        assert call.rates is not None
        markup_bps = call.model.markup_bps
        covered = output_covered(call.hold_nanos, call.input_ceiling, call.rates, markup_bps)
        return covered - facts.extra_output_tokens * facts.choices

    def _place(self, part: int) -> int:
        """Where the last half or quarter of the window begins, nearly."""
        return self._covered() - self._window // part - self._window // PIECE

    def _hold_for(self, tokens: int) -> int:
        call, facts = self._call, self._call.facts
        assert call.rates is not None
        output = tokens + facts.extra_output_tokens * facts.choices
        nanos = hold_for(call.input_ceiling, output, call.rates, call.model.markup_bps)
        return min(nanos, call.hold_max_nanos)

    async def _count(self) -> None:
        """Count the text that no checkpoint has counted yet."""
        progress = self._reply.progress
        part = progress.uncounted(self._seen)
        if len(part.text) <= SHORT_CHARS and is_ready():
            tokens = count_tokens(part.text)
        else:
            tokens = await asyncio.to_thread(count_tokens, part.text)
        progress.write_down(part, None, tokens)

    async def _want_more(self, tokens: int) -> None:
        """Have the next window asked for with the next renewal, or ask now when it is late."""
        call = self._call
        if tokens > self._place(HALF):
            call.wanted_nanos = self._hold_for(max(tokens, self._covered()) + self._window)
        if tokens > self._place(QUARTER) and call.hold_nanos < call.hold_max_nanos:
            await self._ask(tokens)

    async def _ask(self, tokens: int) -> None:
        """Ask the till for what is wanted; at the end of the hold, for all that is there."""
        call, till = self._call, self._reply.services.till
        wanted = call.wanted_nanos
        for _ in range(ASKS_MAX):
            available = await ask(till, call, wanted)
            if available is None and call.hold_nanos < wanted:
                return  # no answer
            if available is not None:
                await count_prompt(call, self._reply.services.counter)
            covered = self._covered()
            if tokens <= covered or call.hold_nanos >= call.hold_max_nanos:
                return
            wanted = call.wanted_nanos
            if available is None or await self._has_news():
                continue
            wanted = min(wanted, call.hold_nanos + available)
            if wanted < self._hold_for(covered + max(self._window // PIECE, 1)):
                break
        # crash-point: credit.exhausted
        self.is_exhausted = True

    async def _has_news(self) -> bool:
        """Whether the book was asked if a refusal still holds, and the till told of it."""
        try:
            return await self._reply.services.till.refresh(self._call.scopes.account_id)
        except BillingError:
            return False  # the till left in between: its refusal stands until it is asked again

    def _plan(self, tokens: int) -> None:
        """Look again before the next place can be reached, if the text goes on as it did."""
        call, seen = self._call, self._seen
        stream, text = seen.bytes - self._looked_at, seen.text_size - self._looked_text
        self._looked_at, self._looked_text = seen.bytes, seen.text_size
        if call.hold_nanos >= call.hold_max_nanos:
            self.look_at = NEVER
            return
        room = self._room(tokens)
        progress = self._reply.progress
        if progress.text_bytes:
            room = max(room, room * progress.text_bytes // (2 * progress.tokens + 1))
        if text > 0:
            # Not far on the word of a few frames: the next may carry much more.
            room = max(room, min(room * stream // text, 4 * seen.bytes, LOOK_BYTES_MAX))
        self.look_at = seen.bytes + max(room, 1)

    def _room(self, tokens: int) -> int:
        """How many tokens may come before there is something to do."""
        covered, least = self._covered(), self._window // PIECE
        if tokens > covered:
            return self._window // QUARTER  # the till did not answer
        rooms = [covered - self._window // part - tokens for part in (HALF, QUARTER)]
        return next((room for room in rooms if room > least), covered - tokens)

    def _cut(self, pieces: list[Piece], excess: int) -> list[Piece]:
        """The first of these frames, without as many tokens at their end."""
        # Usage may stand between them: what comes behind it counts as text that came, too.
        plain = [piece.data for piece in pieces if piece.kind is PieceKind.PLAIN]
        frames = [frame for data in plain for frame in sse.split_frames(data)]
        chars, seen = 0, self._seen
        while frames and excess > 0 and (text := _text_of(frames[-1])) is not None:
            excess -= count_tokens(text)
            chars += len(text)
            # What finished in a frame that is not delivered is not finished for the client.
            seen.finished = seen.finished.difference(finished_choices(frames.pop()))
        seen.cut(chars)
        return [Piece(PieceKind.PLAIN, b"".join(frames))] if frames else []


def _text_of(frame: bytes) -> str | None:
    """The text that a frame has added; None for the rest of one that was delivered in part."""
    payload = sse.payload_of(frame)
    if read_answer(payload) is not None:
        return "".join(texts_in(payload))
    if frame.startswith(b"data:"):
        # The beginning of a frame that is too long to be held back counts as it stands.
        return "" if frame.endswith(b"\n") else frame.decode(errors="replace")
    line = frame.strip(b"\r\n")
    return "" if not line or line.startswith(b":") else None


async def ask(till: Till, call: Call, wanted_nanos: int) -> int | None:
    """Ask for a larger hold. What is available beyond it, when that is too little; else None.

    None also when there was no answer: safe to repeat.
    """
    renewal = Renewal(
        request_id=call.request_id,
        hold_nanos=max(wanted_nanos, call.hold_nanos),
        is_forwarded=call.is_sent,
    )
    scopes = call.scopes
    try:
        status, held, available = await till.renew(scopes, renewal)
        if status == b"wait" and till.epoch.is_known:
            # The till lost its content, and nobody has asked for this account or budget since.
            await till.seed_all(scopes)
            status, held, available = await till.renew(scopes, renewal)
    except BillingError:
        return None
    # crash-point: grow.answered
    call.take_over(held)
    return int(available) if status == b"short" else None


async def pay_in_full(till: Till, call: Call, bill: Bill) -> Bill:
    """The bill of a call that costs more than it holds, and less than it may: hold the rest.

    What was billed unseen (reasoning) is paid so, as far as there is credit.
    """
    wanted = min(bill.charge.price_nanos + bill.charge.overrun_nanos, call.hold_max_nanos)
    available = await ask(till, call, wanted)
    if available is not None and available > 0:
        await ask(till, call, min(wanted, call.hold_nanos + available))
    # The hold may have grown by a renewal meanwhile, too.
    return charged_again(call, bill)
