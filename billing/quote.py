"""How much to hold for a request before it goes upstream: an upper bound of its price. Pure.

Bytes bound tokens: no tokenizer in use makes more than one token of one byte, and the JSON around
a message is longer than the few tokens that the chat format adds for it. Parts that are not text
(images) count with the model's fixed upper bound instead of their bytes.
"""

from billing.money import BPS, NANOS_MAX, TOKENS_PER_RATE, ceil_div, price_of_sum
from billing.prices import Rates

# Chat formats add a few tokens for the whole conversation and each message (about 3 + 4 n); a
# message is at least 28 bytes of JSON, so this constant covers the conversation's part.
FORMAT_TOKENS = 64
# Of the same text other tokenizers make somewhat more tokens than ours: half as many more covers
# those in use for the languages they are made for. What is wrong with a count is asked for at the
# end, and is the operator's when it is not there: never the user's.
COUNT_MARGIN = (3, 2)


def input_ceiling(text_bytes: int, image_parts: int, image_tokens_max: int) -> int:
    """Upper bound of the input tokens."""
    return text_bytes + FORMAT_TOKENS + image_parts * image_tokens_max


def hold_for(input_tokens: int, output_tokens: int, rates: Rates, markup_bps: int) -> int:
    """Nanos to hold: the price if every token were of its dearest kind, capped to what fits.

    Both counts are upper bounds, for all choices together.
    """
    total = input_tokens * rates.input_rate_max + output_tokens * rates.output_rate_max
    return min(price_of_sum(total, markup_bps), NANOS_MAX)


def counted_ceiling(body_tokens: int) -> int:
    """Upper bound of the input tokens, in practice, by our count of the whole body as it came.

    The JSON around the messages counts too, and is longer than what chat formats add instead.
    """
    more, of = COUNT_MARGIN
    return ceil_div(body_tokens * more, of) + FORMAT_TOKENS


def output_covered(hold_nanos: int, input_tokens: int, rates: Rates, markup_bps: int) -> int:
    """The most output tokens for which `hold_for` asks no more than hold_nanos; may be negative.

    Without a price for output there is no bound: then it is what no call can reach.
    """
    if not rates.output_rate_max:
        return NANOS_MAX
    total = hold_nanos * BPS * TOKENS_PER_RATE // markup_bps
    return (total - input_tokens * rates.input_rate_max) // rates.output_rate_max
