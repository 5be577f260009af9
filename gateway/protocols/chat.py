"""POST /v1/chat/completions: bytes in, facts out. Pure.

Reads only what is billed or routed by; everything else passes through as it came.
https://platform.openai.com/docs/api-reference/chat
"""

import re

import msgspec
from msgspec import UNSET, Raw, UnsetType

from gateway.errors import ApiError, invalid
from gateway.protocols.bounds import decoded, is_in, matches_in, refuse_swarm
from gateway.protocols.facts import CallFacts

NAME = "chat.completions"
OUTPUT_TOKENS_MAX = 10_000_000
CHOICES_MAX = 128
MODEL_LENGTH_MAX = 256
OUTPUT_LIMITS = ("max_completion_tokens", "max_tokens")
# Names of keys that are compared before a body counts as ambiguous.
NAMES_MAX = 1000
INCLUDE_USAGE = Raw(b'{"include_usage":true}')

# Parsers differ in which of two equal keys they take; these are the ones that cost money.
BILLED_KEYS = (
    "model",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "messages",
    "prediction",
    "modalities",
    "service_tier",
)
# A letter, digit or underscore written as an escape: no encoder does that but to hide a key.
_HIDDEN_ASCII = re.compile(rb"\\u00(3[0-9]|[46][1-9A-Fa-f]|5[0-9AaFf]|7[0-9Aa])")

# They choose the model, the price or the credential, which are ours to choose. LiteLLM takes
# prices and headers from the body: https://docs.litellm.ai/docs/completion/input
ROUTING_KEYS = frozenset(
    {
        "models",
        "fallbacks",
        "context_window_fallback_dict",
        "route",
        "provider",
        "custom_llm_provider",
        "api_base",
        "base_url",
        "api_key",
        "api_version",
        "model_list",
        "user_config",
        "mock_response",
        "model_info",
        "litellm_params",
        "extra_body",
        "extra_headers",
        "input_cost_per_token",
        "output_cost_per_token",
        "input_cost_per_second",
        "output_cost_per_second",
    }
)
# They cost money beyond tokens, and no price for them is in the book.
UNPRICED_KEYS = frozenset(["web_search_options", "plugins", "search_parameters", "enable_search"])
_WATCHED = (*BILLED_KEYS, *sorted(UNPRICED_KEYS), "include_usage")
# One pass: counting each key by itself took as long as all the rest.
_QUOTED = re.compile(b'"(%b)"' % "|".join(_WATCHED).encode())
_GUARDED = ROUTING_KEYS | UNPRICED_KEYS | frozenset(BILLED_KEYS)
TIERS_AT_LIST_PRICE = frozenset({b'"auto"', b'"default"', b"null"})

# Tools that the client runs; the provider only writes the call, in tokens.
TOOLS_RUN_BY_CLIENTS = frozenset({"function", "custom"})
NAME_CHARS_MAX = 1000
OPTIONS_BYTES_MAX = 16 * 1024

_top = msgspec.json.Decoder(dict[str, Raw])
_text = msgspec.json.Decoder(str)
_options = msgspec.json.Decoder(dict[str, Raw])
_modalities = msgspec.json.Decoder(list[str] | None)
_INTEGER = re.compile(rb"\d{1,9}")
# Where a piece ends the rest may follow in the next one.
_CONTENT_PARTS = re.compile(rb'"content"\s*(?::\s*(?:[\[{]|\Z)|\Z)')


class _Message(msgspec.Struct, gc=False):
    content: Raw | UnsetType = UNSET


class _Part(msgspec.Struct, gc=False):
    type: str = ""


_messages = msgspec.json.Decoder(list[_Message])
_tools = msgspec.json.Decoder(list[_Part] | None)
_parts = msgspec.json.Decoder(list[Raw])
_kinds = msgspec.json.Decoder(list[_Part])
_part = msgspec.json.Decoder(_Part)


def read_facts(body: bytes) -> CallFacts:
    """The facts of a request. Raises ApiError 400, naming the parameter."""
    try:
        refuse_swarm(body)
        if not body.isascii():
            body.decode()  # the decoder looks only at what it reads; later steps rely on UTF-8
        fields = _top.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise invalid(f"The body is no valid JSON object: {exc}.") from exc
    _refuse_keys(fields)
    _refuse_tools(fields)
    hidden = b"\\" in body and is_in(_HIDDEN_ASCII, body)
    options = _stream_options(fields)
    image_parts, image_bytes = _count_images(fields, hidden)
    limits = [_integer(fields, key) for key in OUTPUT_LIMITS]
    asked = [limit for limit in limits if limit is not None]
    return CallFacts(
        model=_model(fields),
        stream=_flag(fields, "stream"),
        stream_options=options,
        wants_usage=options.get("include_usage") == Raw(b"true"),
        text_bytes=len(body) - image_bytes,
        image_parts=image_parts,
        output_tokens=max(asked) if asked else None,
        # Tokens of a rejected prediction are billed as output.
        extra_output_tokens=len(bytes(fields.get("prediction", b""))),
        choices=_choices(fields),
        audio_output=_wants_audio(fields),
        ambiguous=hidden or _has_doubles(body, fields),
        fields=fields,
        body=body,
    )


def upstream_body(facts: CallFacts, upstream_model: str, output_tokens: int | None = None) -> bytes:
    """The body for the provider: as received, unless money or routing needs a change.

    Values keep their bytes; usage is always asked for in streams; when a billed key was ambiguous
    the body is written from what we read, so that the provider reads the same. output_tokens: the
    most that one choice may have, when it is less than what the client asked for.
    """
    # Other spellings of include_usage would undo it: they are not passed on.
    ask_usage = facts.stream and (facts.ambiguous or not facts.wants_usage or _respelt(facts))
    is_changed = upstream_model != facts.model or output_tokens is not None
    if not (ask_usage or facts.ambiguous or is_changed):
        return facts.body
    fields = dict(facts.fields)
    fields["model"] = Raw(msgspec.json.encode(upstream_model))
    if ask_usage:
        kept = {k: v for k, v in facts.stream_options.items() if k.casefold() != "include_usage"}
        options = kept | {"include_usage": Raw(b"true")}
        fields["stream_options"] = Raw(msgspec.json.encode(options))
    if output_tokens is not None:
        fields |= _lowered(facts.fields, output_tokens)
    return msgspec.json.encode(fields)


def _lowered(fields: dict[str, Raw], output_tokens: int) -> dict[str, Raw]:
    """The client's own limits, lowered; without any, the newer of the two."""
    asked = {key: _integer(fields, key) for key in OUTPUT_LIMITS}
    lowered = {key: min(most, output_tokens) for key, most in asked.items() if most is not None}
    lowered = lowered or {OUTPUT_LIMITS[0]: output_tokens}
    return {key: Raw(b"%d" % most) for key, most in lowered.items()}


def _respelt(facts: CallFacts) -> bool:
    return any(k != "include_usage" == k.casefold() for k in facts.stream_options)


def prompt_text(facts: CallFacts) -> str:
    """The text of the request, for counting tokens when the provider reports none."""
    texts: list[str] = []
    for key in ("messages", "tools", "functions", "response_format"):
        raw = facts.fields.get(key)
        if raw is None:
            continue
        try:
            _collect_text(decoded(raw), texts)
        except (msgspec.DecodeError, RecursionError):
            # Numbers out of range, nested too deep, too much: it is counted as it stands.
            texts.append(bytes(raw).decode())
    return "\n".join(texts)


def _collect_text(value: object, texts: list[str]) -> None:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            # A data URL is an image, not text; its price is the model's fixed bound.
            if not (item.startswith("data:") and ";base64," in item[:256]):
                texts.append(item)
        elif isinstance(item, dict):
            pending.extend(item.values())
            texts.extend(str(key) for key in item)
        elif isinstance(item, list):
            pending.extend(item)


def _has_doubles(body: bytes, fields: dict[str, Raw]) -> bool:
    """True when a key that costs money may be there twice (or its name is used elsewhere, too)."""
    seen: set[bytes] = set()
    for number, match in enumerate(matches_in(_QUOTED, body)):
        name = match[1]
        if number > NAMES_MAX:
            return True  # it would take long to be sure; being wrong costs one encoding
        if name in seen and (name == b"include_usage" or name.decode() in fields):
            return True
        seen.add(name)
    return False


def _refuse_tools(fields: dict[str, Raw]) -> None:
    """Tools that the provider runs itself cost money by the call."""
    try:
        tools = _tools.decode(fields.get("tools", b"null")) or []
    except (msgspec.DecodeError, RecursionError) as exc:
        raise invalid("'tools' must be a list of objects.", "tools") from exc
    for tool in tools:
        if tool.type not in TOOLS_RUN_BY_CLIENTS:
            message = f"Tools of type '{tool.type[:64]}' have no price here."
            raise invalid(message, "tools", "unpriced_parameter")


def _refuse_keys(fields: dict[str, Raw]) -> None:
    if max(map(len, fields), default=0) > NAME_CHARS_MAX:
        raise invalid(f"The name of a field has more than {NAME_CHARS_MAX} characters.")
    for key in fields:
        # Go's decoder takes MAX_TOKENS for max_tokens.
        folded = key.casefold()
        if folded != key and folded in _GUARDED:
            raise invalid(f"'{key[:64]}' must be written '{folded}'.", folded)
        if "_cost" in folded:  # LiteLLM lets a request set its own prices
            raise invalid(f"'{key[:64]}' is not supported here.", None, "unsupported_parameter")
    for key in ROUTING_KEYS & fields.keys():
        raise invalid(f"'{key}' is not supported here.", key, "unsupported_parameter")
    for key in UNPRICED_KEYS & fields.keys():
        if bytes(fields[key]) not in {b"null", b"false"}:
            raise invalid(f"'{key}' costs money and has no price.", key, "unpriced_parameter")
    tier = fields.get("service_tier")
    if tier is not None and bytes(tier) not in TIERS_AT_LIST_PRICE:
        key = "service_tier"
        raise invalid(f"This '{key}' has no price here.", key, "unpriced_parameter")


def _model(fields: dict[str, Raw]) -> str:
    try:
        model = _text.decode(fields.get("model", Raw(b"null")))
    except msgspec.DecodeError as exc:
        raise invalid("'model' must be a string.", "model") from exc
    if not 0 < len(model) <= MODEL_LENGTH_MAX:
        raise invalid("'model' must be 1 to 256 characters.", "model")
    return model


def _flag(fields: dict[str, Raw], key: str) -> bool:
    raw = bytes(fields.get(key, b"null"))
    if raw in {b"false", b"null"}:
        return False
    if raw != b"true":
        raise invalid(f"'{key}' must be true or false.", key)
    return True


def _integer(fields: dict[str, Raw], key: str) -> int | None:
    """A strict positive integer: a bool, a float or a negative number must not become a hold."""
    raw = bytes(fields.get(key, b"null"))
    if raw == b"null":
        return None
    if not _INTEGER.fullmatch(raw) or not 0 < int(raw) <= OUTPUT_TOKENS_MAX:
        raise invalid(f"'{key}' must be an integer from 1 to {OUTPUT_TOKENS_MAX}.", key)
    return int(raw)


def _choices(fields: dict[str, Raw]) -> int:
    choices = _integer(fields, "n") or 1
    if choices > CHOICES_MAX:
        raise invalid(f"'n' must be an integer from 1 to {CHOICES_MAX}.", "n")
    return choices


def _stream_options(fields: dict[str, Raw]) -> dict[str, Raw]:
    raw = fields.get("stream_options")
    if raw is None or bytes(raw) == b"null":
        return {}
    if len(bytes(raw)) > OPTIONS_BYTES_MAX:
        raise invalid("'stream_options' is too large.", "stream_options")
    try:
        return _options.decode(raw)
    except msgspec.DecodeError as exc:
        raise invalid("'stream_options' must be an object.", "stream_options") from exc


def _wants_audio(fields: dict[str, Raw]) -> bool:
    raw = fields.get("modalities")
    if raw is None:
        return False
    if len(bytes(raw)) > OPTIONS_BYTES_MAX:
        raise invalid("'modalities' is too large.", "modalities")
    try:
        modalities = _modalities.decode(raw) or []
    except msgspec.DecodeError as exc:
        raise invalid("'modalities' must be a list of strings.", "modalities") from exc
    if not {"text", "audio"}.issuperset(modalities):
        message = "Only the modalities 'text' and 'audio' have a price here."
        raise invalid(message, "modalities", "unpriced_parameter")
    return "audio" in modalities


def _count_images(fields: dict[str, Raw], hidden: bool) -> tuple[int, int]:
    """(image parts, their bytes). Only text and images have a price; other parts are refused."""
    raw = fields.get("messages")
    if raw is None or not (hidden or is_in(_CONTENT_PARTS, bytes(raw))):
        return 0, 0
    count = size = 0
    try:
        for message in _messages.decode(raw):
            if not isinstance(message.content, Raw):
                continue
            first = bytes(memoryview(message.content)[:1])
            if first == b"[":
                found = _images_in(message.content)
                count, size = count + found[0], size + found[1]
            # A single part is not in the specification, but some servers take it.
            elif first == b"{" and _is_image(_part.decode(message.content)):
                count, size = count + 1, size + len(bytes(message.content))
    except (msgspec.DecodeError, RecursionError) as exc:
        raise invalid(f"'messages' is malformed: {exc}.", "messages") from exc
    return count, size


def _images_in(content: Raw) -> tuple[int, int]:
    """(image parts, their bytes) of one message."""
    are_images = [_is_image(part) for part in _kinds.decode(content)]
    if True not in are_images:
        return 0, 0
    # Only now: this list takes anything, and what is no object has been refused.
    parts = zip(_parts.decode(content), are_images, strict=True)
    sizes = [len(bytes(part)) for part, is_image in parts if is_image]
    return len(sizes), sum(sizes)


def _is_image(part: _Part) -> bool:
    """Raises ApiError for what has no price."""
    if part.type not in {"text", "refusal", "image_url"}:
        message = f"Content of type '{part.type[:64]}' has no price here."
        raise invalid(message, "messages", "unpriced_parameter")
    return part.type == "image_url"


def unknown_model(model: str, nearest: list[str]) -> ApiError:
    """404 that names the nearest models."""
    hint = f" Did you mean {', '.join(nearest)}?" if nearest else " See GET /v1/models."
    message = f"The model '{model}' does not exist here.{hint} You were not charged."
    return ApiError(404, "model_not_found", message, param="model")
