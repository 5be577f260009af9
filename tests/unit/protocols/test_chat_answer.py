"""What is read from answers, and what clients get to see of it."""

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw

from billing.usage import Usage
from gateway.protocols.chat_answer import (
    read_answer,
    read_string,
    read_usage,
    texts_in,
    usage_for_client,
    with_usage,
)

COUNTS = b'{"prompt_tokens":10,"completion_tokens":5}'


def report(**fields: Any) -> Usage | None:
    return read_usage(Raw(json.dumps({"prompt_tokens": 10, **fields}).encode())).usage


def test_counts_are_read_by_kind() -> None:
    usage = report(
        completion_tokens=20,
        prompt_tokens_details={"cached_tokens": 4, "audio_tokens": 1, "cache_write_tokens": 2},
        completion_tokens_details={"reasoning_tokens": 7, "audio_tokens": 3},
    )

    assert usage == Usage(
        input_tokens=10,
        output_tokens=20,
        cached_tokens=4,
        audio_input_tokens=1,
        cache_write_tokens=2,
        reasoning_tokens=7,
        audio_output_tokens=3,
    )


def test_an_explicit_zero_is_a_count() -> None:
    assert read_usage(Raw(b'{"prompt_tokens":0,"completion_tokens":0}')).usage == Usage()


def test_kinds_never_exceed_their_totals() -> None:
    usage = report(prompt_tokens_details={"cached_tokens": 2**70})

    assert usage is not None
    assert usage.cached_tokens == 10


@pytest.mark.parametrize("count", [True, 1.0, "5", -1, [], {}])
@pytest.mark.parametrize("key", ["prompt_tokens", "completion_tokens"])
def test_a_count_that_is_none_makes_no_usage(key: str, count: Any) -> None:
    assert report(**{key: count}) is None


@pytest.mark.parametrize(
    "raw", [b"{}", b"[]", b"5", b'"x"', b'{"prompt_tokens":%b}' % (b"9" * 5000), b'{"\xff":1}']
)
def test_what_is_no_usage_makes_none(raw: bytes) -> None:
    assert read_usage(Raw(raw)).usage is None


@pytest.mark.parametrize(
    ("cost", "usd"),
    [
        ("0.1", "0.1"),
        ("1e-7", "0.0000001"),
        ("0", "0"),
        ('"0.25"', "0.25"),
        ("0.30000000000000000001", "0.30000000000000000001"),
    ],
)
def test_a_reported_cost_keeps_its_digits(cost: str, usd: str) -> None:
    raw = Raw(b'{"prompt_tokens":1,"cost":%b}' % cost.encode())

    assert read_usage(raw).reported_usd == Decimal(usd)


@pytest.mark.parametrize(
    "cost", ["null", "true", "-1", '"NaN"', '"x"', "[]", "1e400", '"1e999999"', "{}"]
)
def test_a_cost_that_is_no_amount_of_money_is_none(cost: str) -> None:
    raw = Raw(b'{"prompt_tokens":1,"cost":%b}' % cost.encode())

    assert read_usage(raw).reported_usd is None


def test_the_client_gets_our_price_and_never_the_providers_cost() -> None:
    raw = Raw(
        b'{"prompt_tokens":10,"cost":0.5,"cost_details":{"upstream_inference_cost":0.4},'
        b'"estimated_cost":0.5,"total_cost":1,"Cost":2,"is_byok":false,"x":[1.50]}'
    )

    got = usage_for_client(raw, 1_234_000, "rcpt_1")

    told = {"cost": 0.001234, "cost_nanos": 1_234_000, "receipt_id": "rcpt_1"}
    assert json.loads(got) == {"prompt_tokens": 10, "x": [1.5], **told}
    assert b"[1.50]" in got


@pytest.mark.parametrize("raw", [b"[]", b"5", b'{"\xff":1}', b"null"])
def test_a_usage_that_is_no_object_becomes_one(raw: bytes) -> None:
    got = json.loads(usage_for_client(Raw(raw), 0, "rcpt_1"))

    assert got == {"cost": 0, "cost_nanos": 0, "receipt_id": "rcpt_1"}


COUNT_NAMES = ["prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"]
OTHER_NAMES = ["cost", "Cost", "cost_details", "is_byok", "receipt_id", "x", "\u00e4"]
VALUES = st.none() | st.integers(0, 9) | st.dictionaries(st.text(max_size=3), st.integers())


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(COUNT_NAMES + OTHER_NAMES), VALUES),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_counts_are_told_however_they_are_written(
    fields: dict[str, Any], indent: int | None, ascii_only: bool
) -> None:
    raw = json.dumps(fields, indent=indent, ensure_ascii=ascii_only).encode()
    kept = {k: v for k, v in fields.items() if "cost" not in k.lower() and k != "is_byok"}

    got = usage_for_client(Raw(raw), 1_500_000, "rcpt_1")

    told = {"cost": 0.0015, "cost_nanos": 1_500_000, "receipt_id": "rcpt_1"}
    assert json.loads(got) == {**kept, **told}
    assert got.count(b'"receipt_id"') == 1


@pytest.mark.parametrize(
    ("raw", "usage", "usd"),
    [
        (b'{"prompt_tokens":1,"cost":"\xff"}', Usage(input_tokens=1), None),
        (b'{"prompt_tokens":1,"is_byok":5,"cost":1}', Usage(input_tokens=1), None),
        (b'{"prompt_tokens":"x","cost":1.5}', None, Decimal("1.5")),
        (b'{"prompt_tokens":-1,"cost":1.5}', None, Decimal("1.5")),
        (b'{"cost":1.5}', None, Decimal("1.5")),
        (b'{"prompt_tokens":1,"cost":null}', Usage(input_tokens=1), None),
    ],
)
def test_of_counts_and_cost_each_stands_alone(
    raw: bytes, usage: Usage | None, usd: Decimal | None
) -> None:
    report = read_usage(Raw(raw))

    assert (report.usage, report.reported_usd) == (usage, usd)


@pytest.mark.parametrize(
    ("choices", "has"),
    [
        *((text, False) for text in (b"null", b"[]", b"[ ]", b"[\n" + b" " * 100 + b"\r]")),
        *((text, True) for text in (b"[0]", b"[ {}]", b"[" + b" " * 100 + b"0]", b"{}", b'"x"')),
    ],
)
def test_empty_choices_are_none(choices: bytes, has: bool) -> None:
    answer = read_answer(b'{"choices":%b}' % choices)

    assert answer is not None
    assert answer.has_choices is has


def changed(data: bytes, new: bytes = b'{"new":1}') -> bytes:
    answer = read_answer(data)
    assert answer is not None
    return with_usage(data, answer, new)


def test_only_the_bytes_of_the_usage_change() -> None:
    data = b'{ "id": "x",\n "usage" : ' + COUNTS + b' , "n": 1.50 }\n'

    assert changed(data) == data.replace(COUNTS, b'{"new":1}')


def test_an_equal_object_elsewhere_is_left_alone() -> None:
    data = b'{"a":{},"choices":[{"delta":{}}],"usage":{},"b":{}}'

    assert changed(data) == b'{"a":{},"choices":[{"delta":{}}],"usage":{"new":1},"b":{}}'


@pytest.mark.parametrize(
    "data",
    [
        b'{"usage":{"a":1},"x":1,"usage":{"prompt_tokens":2}}',
        b'{"us\\u0061ge":{"prompt_tokens":2},"x":1}',
        b'{"usage":null,"x":1}',
        b'{"x":1}',
        b'{"x":1,"usage":{"usage":{"prompt_tokens":2}}}',
    ],
)
def test_a_usage_key_that_is_odd_is_exchanged_all_the_same(data: bytes) -> None:
    """Found: with `"usage": null` the body got the key twice."""
    got = changed(data)

    assert json.loads(got) == {"usage": {"new": 1}, "x": 1}
    assert got.count(b'"usage"') == 1


def test_a_usage_beside_another_one_of_that_name_is_found() -> None:
    data = b'{"x_groq":{"usage":{"prompt_tokens":2}},"usage":{"prompt_tokens":2}}'

    assert json.loads(changed(data)) == {**json.loads(data), "usage": {"new": 1}}


@pytest.mark.parametrize("raw", [b"null", b"5", b'"\xff"', b"{}"])
def test_a_name_that_is_no_string_is_empty(raw: bytes) -> None:
    assert read_string(Raw(raw)) == ""


def test_a_name_fits_into_a_receipt() -> None:
    assert read_string(Raw(json.dumps("\x00" + "x" * 300).encode())) == "x" * 255


def test_all_that_is_said_is_counted() -> None:
    call = {"function": {"name": "get_fare", "arguments": "{}"}, "id": "call_1", "type": "function"}
    delta = {"content": "a", "refusal": "b", "reasoning_content": "c", "tool_calls": [call]}
    data = json.dumps({"choices": [{"delta": delta}, {"message": {"content": "d"}}]}).encode()

    assert list(texts_in(data)) == ["a", "b", "c", "get_fare", "{}", "d"]


def test_reasoning_under_two_names_counts_once() -> None:
    delta = {"reasoning_content": "thought", "reasoning": "thought"}

    assert list(texts_in(json.dumps({"choices": [{"delta": delta}]}).encode())) == ["thought"]


def test_text_in_another_shape_is_counted_all_the_same() -> None:
    """Found: content as a list of parts (Mistral) was counted as nothing."""
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    delta = {"role": "assistant", "content": parts}
    data = json.dumps({"id": "x", "choices": [{"index": 0, "delta": delta}]}).encode()

    assert list(texts_in(data)) == ["one", "two"]


@settings(deadline=None)
@given(st.binary(max_size=100) | st.text(max_size=50).map(str.encode))
def test_no_bytes_of_a_provider_make_reading_fail(data: bytes) -> None:
    for prefix in (b"", b'{"choices":', b'{"usage":', b'{"choices":[{"delta":'):
        list(texts_in(prefix + data))
        if (answer := read_answer(prefix + data)) is not None:
            read_usage(answer.usage)
            usage_for_client(answer.usage, 1, "rcpt_1")
            with_usage(prefix + data, answer, b"null")
