"""The charge receipt: one for each admitted request, and its columns in the book. Pure."""

import re
from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Literal
from uuid import UUID

import msgspec

from billing.prices import CostSource
from billing.usage import UsageSource
from billing.windows import Window

SOURCE_SYSTEM = "farebox"
CHARGE_REASON = "llm_call"


class Outcome(StrEnum):
    """How a request ended."""

    COMPLETE = "complete"
    """The whole answer was there to be delivered."""
    CLIENT_LEFT = "client_left"
    """The client hung up before the end."""
    UPSTREAM_FAILED = "upstream_failed"
    """The provider failed after it may have billed."""
    CREDIT_EXHAUSTED = "credit_exhausted"
    """The stream was stopped at the end of what was held."""
    RECOVERED = "recovered"
    """A worker died; the sweeper settled at the last checkpoint."""
    VOIDED = "voided"
    """Nothing billable reached a provider, or it answered with an error."""


class Provenance(StrEnum):
    """What kind of answer the counts were read from."""

    STREAM = "stream"
    RESPONSE = "response"


class FailedAttempt(msgspec.Struct, frozen=True, kw_only=True):
    """A try at a provider that failed before anything could be billed. Holds no content."""

    provider: str
    upstream_model: str
    status: int | None
    """None when no answer came."""
    reason: str
    ms: int


class ChargeReceipt(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One row of charge_receipts, in the order of the columns of a batch in posting.py.

    In JSON a field that has its default is left out: half of the bytes in the till.
    """

    request_id: UUID
    source_reference: str
    billing_account_id: UUID
    virtual_key_id: UUID
    app_key_id: UUID | None
    protocol: str
    provider: str
    requested_model: str
    served_model: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    audio_input_tokens: int = 0
    audio_output_tokens: int = 0
    reported_cost_usd: Decimal | None = None
    provider_cost_nanos: int = 0
    price_nanos: int = 0
    markup_bps: int
    price_version: int | None = None
    hold_nanos: int
    overrun_nanos: int = 0
    cost_source: CostSource = CostSource.NONE
    usage_source: UsageSource = UsageSource.NONE
    outcome: Outcome = Outcome.VOIDED
    provenance: Provenance
    upstream_id: str = ""
    upstream_request_id: str = ""
    run_id: str = ""
    attempt: int = 1
    failed_attempts: tuple[FailedAttempt, ...] = ()
    graph_id: str = ""
    client_retry_count: int = 0
    client_request_id: str = ""
    started_at: datetime
    first_byte_at: datetime | None = None
    finished_at: datetime
    budget_window: Window | Literal[""] = ""
    """Of the budget that it was held on; which of these windows, `started_at` says."""


# What comes from outside is cut to this before it goes into a row.
TEXT_CHARS_MAX = 1000
_TEXT_FIELDS = tuple(
    field.name for field in msgspec.structs.fields(ChargeReceipt) if field.type is str
)
# Postgres takes no NUL, and no encoder takes half of a surrogate pair.
_UNWRITABLE = re.compile("[\x00\ud800-\udfff]")


def writable(text: str) -> str:
    """A text from outside as it goes into a row."""
    if len(text) <= TEXT_CHARS_MAX and text.isprintable():
        return text
    return _UNWRITABLE.sub("", text[:TEXT_CHARS_MAX])


def clean_texts(receipt: ChargeReceipt) -> None:
    """Make every text writable: a provider's odd id must not keep a receipt out of the book."""
    r = receipt
    every = (
        f"{r.source_reference}{r.protocol}{r.provider}{r.requested_model}{r.client_request_id}"
        f"{r.served_model}{r.upstream_id}{r.upstream_request_id}{r.run_id}{r.graph_id}"
    )
    if len(every) <= TEXT_CHARS_MAX and every.isprintable():
        return
    for name in _TEXT_FIELDS:
        setattr(receipt, name, writable(getattr(receipt, name)))


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(ChargeReceipt)


def encode_receipt(receipt: ChargeReceipt) -> bytes:
    """JSON for the outbox; any instance can post it from there."""
    return _encoder.encode(receipt)


def encode_batch(receipts: Iterable[ChargeReceipt]) -> str:
    """A JSON array for `post_receipts`, with every field."""
    return _encoder.encode([msgspec.structs.asdict(receipt) for receipt in receipts]).decode()


def decode_receipt(data: bytes) -> ChargeReceipt:
    """The receipt of an outbox entry's JSON. Raises msgspec.DecodeError or UnicodeDecodeError."""
    return _decoder.decode(data)
