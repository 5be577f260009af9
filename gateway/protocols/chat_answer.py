"""Answers of /v1/chat/completions: find usage in a body or a frame, write ours into it. Pure.

Usage as https://platform.openai.com/docs/api-reference/chat/object describes it; `usage.cost` is
OpenRouter's and LiteLLM's cost in USD.
"""

from collections.abc import Iterator
from decimal import Decimal

import msgspec
from msgspec import Raw, structs

from billing.money import read_reported_usd, usd_text
from billing.usage import Usage
from gateway.protocols.bounds import find_in, is_swarm
from gateway.protocols.facts import UsageReport

# A name that is longer is none; a usage object that is longer is told in our own words.
NAME_BYTES_MAX = 16 * 1024
USAGE_BYTES_MAX = 16 * 1024
_NULL = b"null"
_ABSENT, _NO_CHOICES = Raw(_NULL), Raw(b"[]")
# Strings beside the text of a choice.
_NOT_SAID = frozenset(["id", "role", "type", "finish_reason", "logprobs"])


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None
    audio_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Counts(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None


class _Common(msgspec.Struct):
    """The fields of OpenAI's usage object: none of them is a cost."""

    prompt_tokens: Raw = _ABSENT
    completion_tokens: Raw = _ABSENT
    total_tokens: Raw = _ABSENT
    prompt_tokens_details: Raw = _ABSENT
    completion_tokens_details: Raw = _ABSENT


class _Told(_Common, forbid_unknown_fields=True):
    """They and no others."""


class _CostDetails(msgspec.Struct):
    upstream_inference_cost: Raw = _ABSENT


class _Cost(msgspec.Struct):
    cost: Raw = _ABSENT
    is_byok: bool | None = None
    cost_details: _CostDetails | None = None


class _Usage(_Counts):
    """Counts and cost at once, for when both are in order."""

    cost: Raw = _ABSENT
    is_byok: bool | None = None
    cost_details: _CostDetails | None = None


class Answer(msgspec.Struct):
    """The envelope of a body or of one frame; parts that are absent are `null`."""

    id: Raw = _ABSENT
    model: Raw = _ABSENT
    choices: Raw = _ABSENT
    usage: Raw = _ABSENT
    error: Raw = _ABSENT

    @property
    def has_usage(self) -> bool:
        return self.usage != _ABSENT

    @property
    def has_error(self) -> bool:
        return self.error != _ABSENT

    @property
    def has_choices(self) -> bool:
        if self.choices == _NO_CHOICES:
            return False
        head = bytes(memoryview(self.choices)[:64])
        if head.startswith(b"[") and not b"]".startswith(head[1:].lstrip()[:1]):
            return True
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
_counts = msgspec.json.Decoder(_Counts)
_cost = msgspec.json.Decoder(_Cost)
_common = msgspec.json.Decoder(_Common)
_told = msgspec.json.Decoder(_Told)
_said = msgspec.json.Decoder(_Text)
_fields = msgspec.json.Decoder(dict[str, Raw])
_string = msgspec.json.Decoder(str)
_NO_DETAILS = _Details()
_encoder = msgspec.json.Encoder()
_UNREADABLE = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


def read_answer(data: bytes) -> Answer | None:
    """The envelope of a JSON body or frame; None when it is no JSON object."""
    try:
        return _answer.decode(data)
    except _UNREADABLE:
        return None


def read_string(raw: Raw) -> str:
    """A string field, cut to a length that fits a receipt; '' when it is something else."""
    if len(memoryview(raw)) > NAME_BYTES_MAX:
        return ""
    try:
        return _string.decode(raw)[:256].replace("\x00", "")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""


def read_usage(raw: Raw) -> UsageReport:
    """What the provider says it counted and billed. Counts that are no integers make no usage."""
    try:
        said = _usage.decode(raw)
    except _UNREADABLE:
        # One of the two may still be in order.
        return UsageReport(usage=_read_counts(raw), reported_usd=_read_cost(raw))
    return UsageReport(usage=_usage_of(said), reported_usd=_cost_of(said))


def _read_counts(raw: Raw) -> Usage | None:
    try:
        return _usage_of(_counts.decode(raw))
    except _UNREADABLE:
        return None


def _usage_of(said: _Counts) -> Usage | None:
    prompt, completion = said.prompt_tokens_details, said.completion_tokens_details
    input_tokens, output_tokens = said.prompt_tokens, said.completion_tokens
    if input_tokens < 0 or output_tokens < 0:
        return None
    # xAI and Gemini's compatible endpoint leave reasoning out of completion_tokens but not out of
    # the total: https://docs.x.ai/docs/guides/reasoning
    beyond = max((said.total_tokens or 0) - input_tokens - output_tokens, 0)
    if not beyond and prompt is None and completion is None:
        return Usage(input_tokens=input_tokens, output_tokens=output_tokens)
    prompt, completion = prompt or _NO_DETAILS, completion or _NO_DETAILS
    usage = Usage(
        input_tokens=input_tokens,
        output_tokens=output_tokens + beyond,
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
    try:
        return _cost_of(_cost.decode(raw))
    except _UNREADABLE:
        return None


def _cost_of(said: _Cost | _Usage) -> Decimal | None:
    """`usage.cost` from its own digits: a float in between would change the amount."""
    cost = None if said.cost == _ABSENT else _read_usd(said.cost)
    if not said.is_byok:
        return cost
    # OpenRouter with the operator's own provider key: `cost` is only its fee, often 0.
    # https://openrouter.ai/docs/use-cases/byok
    behind = _read_usd((said.cost_details or _CostDetails()).upstream_inference_cost)
    return None if cost is None or behind is None else cost + behind


def _read_usd(raw: Raw) -> Decimal | None:
    text = bytes(raw).decode(errors="replace").strip('"')
    return None if text == "null" else read_reported_usd(text)


def usage_for_client(raw: Raw, price_nanos: int, receipt_id: str) -> bytes:
    """The usage object as the client gets it: the provider's counts, our price, the receipt.

    `cost` is a JSON number, as OpenRouter's clients want it; what the provider billed is not told.
    """
    price = b'"cost":%b,"cost_nanos":%d,"receipt_id":%b}' % (
        usd_text(price_nanos).encode(),
        price_nanos,
        _encoder.encode(receipt_id),
    )
    data = bytes(raw)
    if len(data) > USAGE_BYTES_MAX:
        data = _shortened(data)
        raw = Raw(data)
    if _is_plain(data):
        head = data[:-1].rstrip()
        return head + price if head == b"{" else b"%b,%b" % (head, price)
    try:
        told = _fields.decode(raw)
    except _UNREADABLE:
        told = {}
    # cost, cost_details, estimated_cost, total_cost, ...: every provider has a name of its own.
    fields = {k: v for k, v in told.items() if "cost" not in k.lower() and k != "is_byok"}
    fields.pop("receipt_id", None)
    head = _encoder.encode(fields)[:-1]
    return head + price if head == b"{" else b"%b,%b" % (head, price)


def _is_plain(data: bytes) -> bool:
    """True for an object on one line with no other fields than those that clients are told."""
    if b"\n" in data or b"\r" in data:
        return False
    try:
        _told.decode(data)
    except _UNREADABLE:
        return False
    return True


def _shortened(data: bytes) -> bytes:
    """Of an object that is too large, the fields that clients are told, if they are not."""
    try:
        told = _common.decode(data)
    except _UNREADABLE:
        return b"{}"
    fields = {name: getattr(told, name) for name in told.__struct_fields__}
    short = {k: v for k, v in fields.items() if v != _ABSENT and len(memoryview(v)) < 1024}
    return _encoder.encode(short)


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
    place = usage_place(data, answer)
    if place is not None:
        return data[: place[0]] + new + data[place[1] :]
    if is_swarm(data):  # only what we read of it
        told = {k: v for k, v in structs.asdict(answer).items() if v != _ABSENT}
        return _encoder.encode({**told, "usage": Raw(new)})
    try:
        fields = _fields.decode(data)
    except _UNREADABLE:
        return data  # a key that is no text, or nested to the edge of what can be read
    fields["usage"] = Raw(new)
    return msgspec.json.encode(fields)


def usage_place(data: bytes, answer: Answer) -> tuple[int, int] | None:
    """Where in the JSON its usage object begins and ends; None when that is not sure."""
    key = find_in(data, b'"usage"', 0)
    if key >= 0 and answer.has_usage and find_in(data, b'"usage"', key + 1) < 0:
        old = bytes(answer.usage)
        at = data.find(old, key)
        if at >= 0:
            return at, at + len(old)
    return None


def texts_in(data: bytes) -> Iterator[str]:
    """The texts that one JSON body or frame carries to the user, tool calls included.

    From more elements than any answer has, the JSON itself.
    """
    if is_swarm(data):
        answer = read_answer(data)
        if answer is not None and is_swarm(bytes(answer.choices)):
            yield bytes(answer.choices).decode(errors="replace")
            return
    try:
        choices = _said.decode(data).choices or []
    except _UNREADABLE:
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
    except _UNREADABLE:
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
