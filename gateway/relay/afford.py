"""How much a call holds, and how it is made to fit into what the account can pay.

A prompt is counted, and the output lowered, only when the cheap bounds would mean a refusal.
"""

from billing.prices import Rates
from billing.quote import counted_ceiling, hold_for, input_ceiling, output_covered
from billing.tokens import TokenCounter
from gateway.protocols.facts import CallFacts
from gateway.relay.call import Call

# Text has hardly ever more bytes for each token than this: English, which has some four and a
# half; other scripts (Russian and Hindi have up to ten); text whose letters are written \u0431.
BYTES_PER_TOKEN_MOST, BYTES_OTHERS, BYTES_ESCAPED = 8, 16, 40
# What limits of tokens per minute go by until a request has ended: likely, not bounds.
BYTES_PER_TOKEN_LIKELY = 4
OUTPUT_TOKENS_LIKELY = 4096
# A longer prompt is not counted: whoever cannot pay could keep our processors busy with it.
COUNTED_BYTES_MAX = 1024 * 1024


def size_hold(call: Call, rates: Rates) -> None:
    """Set the most that the call may hold, and what it holds at its beginning.

    A stream can be stopped at the end of what is held, so it begins with a window of its output.
    """
    facts, markup_bps = call.facts, call.model.markup_bps
    extra, choices = facts.extra_output_tokens, facts.choices
    call.output_max = (call.output_tokens + extra) * choices
    call.hold_max_nanos = hold_for(call.input_ceiling, call.output_max, rates, markup_bps)
    first = _first_window(call)
    if first < call.output_tokens:
        output = (first + extra) * choices
        call.hold_nanos = hold_for(call.input_ceiling, output, rates, markup_bps)
    else:
        call.hold_nanos = call.hold_max_nanos


def prompt_least(facts: CallFacts) -> int:
    """Tokens of the prompt that are there without doubt; the JSON around the messages is none."""
    around = len(facts.body) - memoryview(facts.fields.get("messages", b"")).nbytes
    return max((facts.text_bytes - around) // _bytes_per_token(facts.body), 1)


def likely_tokens(call: Call) -> int:
    """Tokens that it takes of limits per minute at first: the prompt's, and as much output as it
    asks for; a stream's first window, or where it asks for no limit, a usual answer.
    """
    facts, model = call.facts, call.model
    output = call.output_tokens
    if facts.stream or not facts.output_tokens:
        output = min(output, model.stream_window_tokens or OUTPUT_TOKENS_LIKELY)
    prompt = facts.text_bytes // BYTES_PER_TOKEN_LIKELY + facts.image_parts * model.image_tokens_max
    return prompt + output * facts.choices


def _bytes_per_token(body: bytes) -> int:
    """The most that a token of it is likely to have."""
    if b"\\u" in body:
        return BYTES_ESCAPED
    return BYTES_PER_TOKEN_MOST if body.isascii() else BYTES_OTHERS


def bound_prompt(call: Call) -> None:
    """Set the bound of the input tokens that costs nothing to get."""
    facts = call.facts
    images_max = call.model.image_tokens_max
    call.input_ceiling = input_ceiling(facts.text_bytes, facts.image_parts, images_max)


async def count_prompt(call: Call, counter: TokenCounter) -> bool:
    """Bound the input tokens by a count of the whole body; False when the bound stays as it is.

    All of the body is counted, so whatever a provider reads of it is in the bound. Images are not
    text: a body with images keeps its bound.
    """
    facts = call.facts
    if call.is_counted or facts.image_parts or len(facts.body) > COUNTED_BYTES_MAX:
        return False
    call.is_counted = True
    ceiling = counted_ceiling(await counter.count(facts.body.decode))
    if ceiling >= call.input_ceiling:
        return False
    call.input_ceiling = ceiling
    return True


async def fit(call: Call, available_nanos: int, output_min: int, counter: TokenCounter) -> bool:
    """Make the call cost no more than what is available; False, and as asked for, if it cannot be.

    The output is lowered, but neither below output_min nor below what was asked for.
    """
    rates, asked = call.rates, call.output_asked
    if rates is None:
        return False
    call.output_tokens, call.lowered_to = asked, None
    least = min(output_min, asked)
    # A count is worth its time only if it may help.
    surely = call.facts.text_bytes // _bytes_per_token(call.facts.body)
    if _affords(call, rates, available_nanos, surely) >= least:
        await count_prompt(call, counter)
    affords = _affords(call, rates, available_nanos, call.input_ceiling)
    if least <= affords < _first_window(call):
        call.output_tokens = call.lowered_to = affords
    size_hold(call, rates)
    return affords >= least


def _affords(call: Call, rates: Rates, nanos: int, input_tokens: int) -> int:
    """The output tokens of one choice that these nanos pay beside such a prompt."""
    facts = call.facts
    covered = output_covered(nanos, input_tokens, rates, call.model.markup_bps)
    return covered // facts.choices - facts.extra_output_tokens


def _first_window(call: Call) -> int:
    """The output tokens of one choice that are held before the call begins."""
    window = call.model.stream_window_tokens
    return min(window, call.output_tokens) if window and call.facts.stream else call.output_tokens
