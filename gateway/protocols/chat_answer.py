"""Answers of /v1/chat/completions: find usage in a body or a frame, write ours into it. Pure.

Usage as https://platform.openai.com/docs/api-reference/chat/object describes it; `usage.cost` is
OpenRouter's and LiteLLM's cost in USD.
"""

from collections.abc import Iterator
from decimal import Decimal

import msgspec
from msgspec import Raw

from billing.money import read_reported_usd, usd_text
from billing.usage import Usage
from gateway.protocols.facts import UsageReport

_NULL = b"null"
# Strings beside the text of a choice.
_NOT_SAID = frozenset(["id", "role", "type", "finish_reason", "logprobs"])


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None
    audio_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None


class _CostDetails(msgspec.Struct):
    upstream_inference_cost: Raw = Raw(_NULL)


class _Cost(msgspec.Struct):
    cost: Raw = Raw(_NULL)
    is_byok: bool | None = None
    cost_details: _CostDetails | None = None


class Answer(msgspec.Struct):
    """The envelope of a body or of one frame; parts that are absent are `null`."""

    id: Raw = Raw(_NULL)
    model: Raw = Raw(_NULL)
    choices: Raw = Raw(_NULL)
    usage: Raw = Raw(_NULL)
    error: Raw = Raw(_NULL)

    @property
    def has_usage(self) -> bool:
        return bytes(self.usage) != _NULL

    @property
    def has_error(self) -> bool:
        return bytes(self.error) != _NULL

    @property
    def has_choices(self) -> bool:
        return bytes(self.choices).translate(None, b" \t\r\n") not in {_NULL, b"[]"}


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    function: _Function | None = None


class _Said(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_ToolCall] | None = None
    function_call: _Function | None = None


class _Choice(msgspec.Struct):
    delta: _Said | None = None
    message: _Said | None = None


class _Text(msgspec.Struct):
    choices: list[_Choice] | None = None


_answer = msgspec.json.Decoder(Answer)
_usage = msgspec.json.Decoder(_Usage)
_cost = msgspec.json.Decoder(_Cost)
_said = msgspec.json.Decoder(_Text)
_fields = msgspec.json.Decoder(dict[str, Raw])
_string = msgspec.json.Decoder(str)


def read_answer(data: bytes) -> Answer | None:
    """The envelope of a JSON body or frame; None when it is no JSON object."""
    try:
        return _answer.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None


def read_string(raw: Raw) -> str:
    """A string field, cut to a length that fits a receipt; '' when it is something else."""
    try:
        return _string.decode(raw)[:256].replace("\x00", "")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""


def read_usage(raw: Raw) -> UsageReport:
    """What the provider says it counted and billed. Counts that are no integers make no usage."""
    return UsageReport(usage=_read_counts(raw), reported_usd=_read_cost(raw))


def _read_counts(raw: Raw) -> Usage | None:
    try:
        counts = _usage.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    prompt = counts.prompt_tokens_details or _Details()
    completion = counts.completion_tokens_details or _Details()
    # xAI and Gemini's compatible endpoint leave reasoning out of completion_tokens but not out of
    # the total: https://docs.x.ai/docs/guides/reasoning
    beyond = (counts.total_tokens or 0) - counts.prompt_tokens - counts.completion_tokens
    beyond = max(beyond, 0) if min(counts.prompt_tokens, counts.completion_tokens) >= 0 else 0
    usage = Usage(
        input_tokens=counts.prompt_tokens,
        output_tokens=counts.completion_tokens + beyond,
        cached_tokens=prompt.cached_tokens or 0,
        cache_write_tokens=prompt.cache_write_tokens or 0,
        audio_input_tokens=prompt.audio_tokens or 0,
        reasoning_tokens=max(completion.reasoning_tokens or 0, beyond),
        audio_output_tokens=completion.audio_tokens or 0,
    )
    if min(msgspec.structs.astuple(usage)) < 0:
        return None
    return usage.within_totals()


def _read_cost(raw: Raw) -> Decimal | None:
    """`usage.cost` from its own digits: a float in between would change the amount."""
    try:
        told = _cost.decode(raw)
        cost = _read_usd(told.cost)
        if not told.is_byok:
            return cost
        # OpenRouter with the operator's own provider key: `cost` is only its fee, often 0.
        # https://openrouter.ai/docs/use-cases/byok
        behind = _read_usd((told.cost_details or _CostDetails()).upstream_inference_cost)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    return None if cost is None or behind is None else cost + behind


def _read_usd(raw: Raw) -> Decimal | None:
    text = bytes(raw).decode().strip('"')
    return None if text == "null" else read_reported_usd(text)


def usage_for_client(raw: Raw, price_nanos: int, receipt_id: str) -> bytes:
    """The usage object as the client gets it: the provider's counts, our price, the receipt.

    `cost` is a JSON number, as OpenRouter's clients want it; what the provider billed is not told.
    """
    try:
        told = _fields.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        told = {}
    # cost, cost_details, estimated_cost, total_cost, ...: every provider has a name of its own.
    fields = {k: v for k, v in told.items() if "cost" not in k.lower() and k != "is_byok"}
    fields["cost"] = Raw(usd_text(price_nanos).encode())
    fields["cost_nanos"] = Raw(b"%d" % price_nanos)
    fields["receipt_id"] = Raw(msgspec.json.encode(receipt_id))
    return msgspec.json.encode(fields)


def usage_object(usage: Usage) -> Raw:
    """A usage object for an answer whose provider sent none."""
    return Raw(
        msgspec.json.encode(
            {
                "prompt_tokens": usage.input_tokens,
                "completion_tokens": usage.output_tokens,
                "total_tokens": usage.input_tokens + usage.output_tokens,
            }
        )
    )


def with_usage(data: bytes, answer: Answer, new: bytes) -> bytes:
    """JSON with its usage object exchanged or added; every other byte stays where it can.

    Where it cannot (the key is there twice, written with escapes, or missing), the values stay.
    """
    if answer.has_usage and data.count(b'"usage"') == 1:
        old = bytes(answer.usage)
        at = data.find(old, data.find(b'"usage"'))
        if at >= 0:
            return data[:at] + new + data[at + len(old) :]
    try:
        fields = _fields.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return data  # a key that is no text, or nested to the edge of what can be read
    fields["usage"] = Raw(new)
    return msgspec.json.encode(fields)


def texts_in(data: bytes) -> Iterator[str]:
    """The texts that one JSON body or frame carries to the user, tool calls included."""
    try:
        choices = _said.decode(data).choices or []
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        yield from _texts_anyhow(data)
        return
    for choice in choices:
        said = choice.delta or choice.message
        if said is not None:
            yield from _texts_said(said)


def _texts_said(said: _Said) -> Iterator[str]:
    for text in (said.content, said.refusal, said.reasoning_content or said.reasoning):
        if text:
            yield text
    calls = [call.function for call in said.tool_calls or []] + [said.function_call]
    for function in calls:
        if function is not None:
            yield from (text for text in (function.name, function.arguments) if text)


def _texts_anyhow(data: bytes) -> Iterator[str]:
    """All strings below `choices`, when they have another shape (Mistral's lists of parts)."""
    try:
        pending = [msgspec.json.decode(_answer.decode(data).choices)]
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            told = {k: v for k, v in value.items() if k not in _NOT_SAID}
            pending.extend(reversed(told.values()))
        elif isinstance(value, list):
            pending.extend(reversed(value))
