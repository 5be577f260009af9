"""How much to hold for a request before it goes upstream: an upper bound of its price. Pure.

Bytes bound tokens: no tokenizer in use makes more than one token of one byte, and the JSON around
a message is longer than the few tokens that the chat format adds for it. Parts that are not text
(images) count with the model's fixed upper bound instead of their bytes.
"""

from billing.money import NANOS_MAX, price_of_sum
from billing.prices import Rates

# Chat formats add a few tokens for the whole conversation and each message (about 3 + 4 n); a
# message is at least 28 bytes of JSON, so this constant covers the conversation's part.
FORMAT_TOKENS = 64


def input_ceiling(text_bytes: int, image_parts: int, image_tokens_max: int) -> int:
    """Upper bound of the input tokens."""
    return text_bytes + FORMAT_TOKENS + image_parts * image_tokens_max


def hold_for(input_tokens: int, output_tokens: int, rates: Rates, markup_bps: int) -> int:
    """Nanos to hold: the price if every token were of its dearest kind, capped to what fits.

    Both counts are upper bounds, for all choices together.
    """
    total = input_tokens * rates.input_rate_max + output_tokens * rates.output_rate_max
    return min(price_of_sum(total, markup_bps), NANOS_MAX)
