"""Receipts come back from the outbox as they went in."""

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from uuid import UUID, uuid4

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.prices import CostSource
from billing.receipts import (
    TEXT_CHARS_MAX,
    ChargeReceipt,
    FailedAttempt,
    Outcome,
    Provenance,
    clean_texts,
    decode_receipt,
    encode_receipt,
)
from billing.usage import UsageSource

TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
COUNT = st.integers(0, 2**53 - 1)
ZONES = st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30))])
MOMENTS = st.datetimes(datetime(2020, 1, 1), datetime(2100, 1, 1), timezones=ZONES)  # noqa: DTZ001
ATTEMPTS = st.builds(
    FailedAttempt,
    provider=TEXT,
    upstream_model=TEXT,
    status=st.none() | st.integers(300, 599),
    reason=TEXT,
    ms=COUNT,
)
RECEIPTS = st.builds(
    ChargeReceipt,
    request_id=st.uuids(),
    source_reference=TEXT,
    billing_account_id=st.uuids(),
    virtual_key_id=st.uuids(),
    app_key_id=st.none() | st.uuids(),
    protocol=TEXT,
    provider=TEXT,
    requested_model=TEXT,
    served_model=TEXT,
    input_tokens=COUNT,
    reported_cost_usd=st.none() | st.decimals(0, 9_007_199, allow_nan=False, places=30),
    provider_cost_nanos=COUNT,
    price_nanos=COUNT,
    markup_bps=st.integers(10_000, 10**6),
    price_version=st.none() | COUNT,
    hold_nanos=COUNT,
    overrun_nanos=COUNT,
    cost_source=st.sampled_from(CostSource),
    usage_source=st.sampled_from(UsageSource),
    outcome=st.sampled_from(Outcome),
    failed_attempts=st.lists(ATTEMPTS, max_size=3).map(tuple),
    provenance=st.sampled_from(Provenance),
    started_at=MOMENTS,
    first_byte_at=st.none() | MOMENTS,
    finished_at=MOMENTS,
)


def receipt(**fields: object) -> ChargeReceipt:
    values: dict[str, object] = {
        "request_id": uuid4(),
        "source_reference": "r",
        "billing_account_id": uuid4(),
        "virtual_key_id": uuid4(),
        "app_key_id": None,
        "protocol": "chat.completions",
        "provider": "p",
        "requested_model": "m",
        "markup_bps": 20_000,
        "hold_nanos": 0,
        "provenance": Provenance.STREAM,
        "started_at": datetime.now(UTC),
        "finished_at": datetime.now(UTC),
    }
    return ChargeReceipt(**{**values, **fields})  # type: ignore[arg-type]


@given(RECEIPTS)
def test_a_receipt_comes_back_as_it_went(one: ChargeReceipt) -> None:
    back = decode_receipt(encode_receipt(one))

    assert back == one
    assert isinstance(back.request_id, UUID)
    assert str(back.reported_cost_usd) == str(one.reported_cost_usd)


def test_a_reported_cost_keeps_every_digit() -> None:
    usd = Decimal("0.000000123456789012345678901234567890")

    assert decode_receipt(encode_receipt(receipt(reported_cost_usd=usd))).reported_cost_usd == usd


def test_a_newer_releases_receipt_can_be_read() -> None:
    fields = msgspec.json.decode(encode_receipt(receipt()))
    data = msgspec.json.encode({**fields, "field_of_tomorrow": 1})

    assert decode_receipt(data).requested_model == "m"


@pytest.mark.parametrize("data", [b"", b"{}", b"null", b"[1]", b"\xff", b'{"request_id": 1}'])
def test_garbage_is_no_receipt(data: bytes) -> None:
    with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)):
        decode_receipt(data)


@given(st.text(max_size=50))
def test_every_text_becomes_writable(text: str) -> None:
    """A NUL in a provider's id made Postgres refuse the receipt for good."""
    one = receipt(served_model=text, upstream_id=text + "\x00\ud800", run_id=text * 100)

    clean_texts(one)

    for value in (one.served_model, one.upstream_id, one.run_id):
        assert "\x00" not in value
        assert len(value) <= TEXT_CHARS_MAX
        assert decode_receipt(encode_receipt(one)).served_model == one.served_model
        value.encode()


@pytest.mark.parametrize(
    "name", [field.name for field in msgspec.structs.fields(ChargeReceipt) if field.type is str]
)
@pytest.mark.parametrize("odd", ["a\x00b", "a\ud800b"])
def test_no_text_is_forgotten(name: str, odd: str) -> None:
    one = receipt(**{name: odd})

    clean_texts(one)

    assert getattr(one, name) == "ab"


def test_cleaning_leaves_ordinary_texts_alone() -> None:
    one = receipt(served_model="gpt-ü 模型", upstream_id="a\nb", outcome=Outcome.COMPLETE)

    clean_texts(one)

    assert (one.served_model, one.upstream_id) == ("gpt-ü 模型", "a\nb")
    assert one.outcome is Outcome.COMPLETE
