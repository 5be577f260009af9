"""How far an answer came, in tokens that were counted as it grew."""

import msgspec

from gateway.relay.call import Call
from gateway.relay.seen import Seen

# A text counted in two pieces has hardly ever more tokens than this beyond its count as a whole;
# a short piece, which begins and ends with a token of the provider's, less.
MEETING_TOKENS = 3


class Uncounted(msgspec.Struct, frozen=True):
    """Text that no count has yet, and whether the prompt has none either."""

    start: int
    text: str
    with_prompt: bool


class Progress:
    """The counts of one call. Two may count at once: who comes second is not taken twice."""

    __slots__ = ("_call", "_is_prompt_counted", "chars", "text_bytes", "tokens")

    def __init__(self, call: Call) -> None:
        self._call = call
        self._is_prompt_counted = False
        self.chars = self.text_bytes = self.tokens = 0
        """Of the text up to here. Counted in pieces it makes rather more tokens than as a whole."""

    def uncounted(self, seen: Seen) -> Uncounted:
        seen.fold()
        return Uncounted(self.chars, seen.text_after(self.chars), not self._is_prompt_counted)

    def write_down(self, part: Uncounted, prompt_tokens: int | None, text_tokens: int) -> None:
        """Take over a count, into the receipt too: never more than the provider will count."""
        receipt = self._call.receipt
        if receipt is None or not self._call.is_open:
            return
        if prompt_tokens is not None:
            # Counted, it replaces the estimate, which may be the higher one; 0: too long to count.
            receipt.input_tokens = prompt_tokens or receipt.input_tokens
            self._is_prompt_counted = True
        if part.text and part.start == self.chars:
            beyond = min(MEETING_TOKENS, 1 + text_tokens // 16) if self.chars else 0
            receipt.output_tokens += max(text_tokens - beyond, 0)
            self.chars += len(part.text)
            self.text_bytes += len(part.text.encode(errors="replace"))
            self.tokens += text_tokens
