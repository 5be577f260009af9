"""Token counts by kind, and which counts are believed.

The convention is OpenAI's: cached, cache-written and audio input tokens are part of input_tokens,
reasoning and audio output tokens are part of output_tokens.
https://platform.openai.com/docs/api-reference/chat/object
"""

from enum import StrEnum

import msgspec

# No call bills this many tokens; beyond it a count is a fault of the provider.
TOKENS_MAX = 100_000_000


class UsageSource(StrEnum):
    """Where the token counts of a receipt come from."""

    PROVIDER = "provider"
    """The provider's usage object."""
    COUNTED = "counted"
    """Our tokenizer, because the provider reported nothing believable."""
    CHECKPOINT = "checkpoint"
    """The last progress a dead worker had written down."""
    NONE = "none"
    """Nothing billable happened."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one call. Invariant: the kinds never add up to more than their totals."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    audio_input_tokens: int = 0
    reasoning_tokens: int = 0
    audio_output_tokens: int = 0

    def within_totals(self) -> "Usage":
        """The same usage with every kind cut to what its total leaves room for, never below 0."""
        audio_in = _cut(self.audio_input_tokens, self.input_tokens)
        cached = _cut(self.cached_tokens, self.input_tokens - audio_in)
        written = _cut(self.cache_write_tokens, self.input_tokens - audio_in - cached)
        audio_out = _cut(self.audio_output_tokens, self.output_tokens)
        reasoning = _cut(self.reasoning_tokens, self.output_tokens - audio_out)
        return Usage(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            cached_tokens=cached,
            cache_write_tokens=written,
            audio_input_tokens=audio_in,
            reasoning_tokens=reasoning,
            audio_output_tokens=audio_out,
        )


def is_believable(usage: Usage, input_ceiling: int, output_bytes: int, output_max: int) -> bool:
    """False for counts that cannot be true: the receipt then uses our own count.

    input_ceiling: upper bound from the request (quote.py); output_bytes: what was received;
    output_max: most tokens the request could ask for. Hidden reasoning makes output tokens
    exceed the bytes seen, so only both bounds together refuse a count. The factor leaves room
    for what providers add (system prompts of their own, tool descriptions).
    """
    if not (0 <= usage.input_tokens <= TOKENS_MAX and 0 <= usage.output_tokens <= TOKENS_MAX):
        return False
    if usage.input_tokens > 8 * input_ceiling + 50_000:
        return False
    return usage.output_tokens <= max(8 * output_bytes, 2 * output_max) + 1_000


def _cut(count: int, room: int) -> int:
    return max(min(count, room), 0)
