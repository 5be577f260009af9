"""What every protocol reads from a request and from an answer. Pure."""

from decimal import Decimal

import msgspec
from msgspec import Raw

from billing.usage import Usage


class CallFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The few fields of a request that are billed or routed by."""

    model: str
    stream: bool
    stream_options: dict[str, Raw]
    wants_usage: bool
    text_bytes: int
    image_parts: int
    output_tokens: int | None
    extra_output_tokens: int
    choices: int
    audio_output: bool
    ambiguous: bool
    fields: dict[str, Raw]
    body: bytes


class UsageReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a provider said about one call. usage is None when it made no sense."""

    usage: Usage | None
    reported_usd: Decimal | None
