"""What is read from a chat completion request, and that nothing odd gets past it."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import ApiError
from gateway.protocols.chat import prompt_text, read_facts
from gateway.protocols.facts import CallFacts

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 4000}}


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [], **fields}).encode()


def facts(**fields: Any) -> CallFacts:
    return read_facts(body(**fields))


def refused(data: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read_facts(data)
    assert caught.value.status == 400
    assert "You were not charged." in caught.value.message
    return caught.value


def test_a_plain_request_is_read() -> None:
    read = facts(messages=[{"role": "user", "content": "hi"}], temperature=0.5)

    assert (read.model, read.stream, read.wants_usage) == ("m", False, False)
    assert (read.output_tokens, read.choices, read.image_parts) == (None, 1, 0)
    assert read.text_bytes == len(read.body)
    assert not read.ambiguous


@pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens", "n"])
@pytest.mark.parametrize(
    "value",
    [
        *("true", "false", "1.0", "1e1", "-1", "0", '"5"', "[1]", "{}", "-0", "99999999999"),
        "9" * 5000,
    ],
)
def test_an_integer_that_is_none_is_refused_by_name(key: str, value: str) -> None:
    error = refused(b'{"model":"m","%b":%b}' % (key.encode(), value.encode()))

    assert error.param == key


@pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens", "n"])
def test_an_integer_may_be_null(key: str) -> None:
    read = facts(**{key: None})

    assert (read.output_tokens, read.choices) == (None, 1)


def test_the_larger_of_both_limits_counts() -> None:
    assert facts(max_tokens=7, max_completion_tokens=9).output_tokens == 9
    assert facts(max_tokens=9, max_completion_tokens=7).output_tokens == 9


def test_too_many_choices_are_refused() -> None:
    assert facts(n=128).choices == 128
    assert refused(body(n=129)).param == "n"


def test_a_prediction_may_be_billed_as_output() -> None:
    prediction = {"type": "content", "content": "x" * 100}

    assert facts(prediction=prediction).extra_output_tokens >= 100
    assert facts().extra_output_tokens == 0


@pytest.mark.parametrize("value", ["1", '"true"', "[]", "1.0"])
def test_stream_must_be_a_boolean(value: str) -> None:
    assert refused(b'{"model":"m","stream":%b}' % value.encode()).param == "stream"


@pytest.mark.parametrize(
    ("options", "wants"),
    [
        (None, False),
        ({}, False),
        ({"include_usage": False}, False),
        ({"include_usage": None}, False),
        ({"include_usage": True}, True),
        ({"include_usage": True, "more": 1}, True),
    ],
)
def test_a_usage_chunk_is_wanted_only_when_it_was_asked_for(options: Any, wants: bool) -> None:
    assert facts(stream=True, stream_options=options).wants_usage is wants


@pytest.mark.parametrize("value", ["1", '"x"', "[]", "true"])
def test_stream_options_must_be_an_object(value: str) -> None:
    data = b'{"model":"m","stream":true,"stream_options":%b}' % value.encode()

    assert refused(data).param == "stream_options"


@pytest.mark.parametrize("model", ["null", "1", "[]", '""', '"' + "m" * 257 + '"'])
def test_the_model_must_be_a_short_string(model: str) -> None:
    assert refused(b'{"model":%b}' % model.encode()).param == "model"


def test_a_request_without_a_model_is_refused() -> None:
    assert refused(b"{}").param == "model"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b'{"model":"m"}x',
        b'{"model":"m",}',
        b"\xef\xbb\xbf{}",
        b'{"model":"m","x":NaN}',
        b'{"model":"m","x":01}',
        b'{"model":"m","x":"\x01"}',
        b'{"model":"m","x":"\\ud800"}',
        b'{"model":"m","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model":"m","messages":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    refused(data)


@pytest.mark.parametrize(
    "data",
    [
        b'{"model":"\xff"}',
        b'{"model":"m","\xff":1}',
        b'{"model":"m","stream":true,"stream_options":{"\xff":1}}',
        b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}',
        b'{"model":"m","messages":[{"content":[{"type":"\xc3"}]}]}',
        b'{"model":"m","messages":[{"content":[{"type":"text","text":"\xed\xa0\x80"}]}]}',
    ],
)
def test_bytes_that_are_no_utf8_are_refused_wherever_they_are(data: bytes) -> None:
    """Found: the decoder checks only what it reads; a hold was left open when the text was read."""
    refused(data)


def read_or_refused(data: bytes) -> CallFacts | None:
    try:
        return read_facts(data)
    except ApiError as exc:
        return None if exc.status == 400 else pytest.fail(f"status {exc.status}")


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_fail_as_a_400(data: bytes) -> None:
    read_or_refused(data)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [
        *("model", "stream", "stream_options", "max_tokens", "n", "messages", "prediction"),
        *("modalities", "service_tier", "plugins", "provider", "tools", "x"),
    ]
)
PARTS = st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url", "file", 5])})
MESSAGES = st.lists(
    st.fixed_dictionaries({"content": JSON_VALUES | PARTS | st.lists(PARTS | JSON_VALUES)})
    | JSON_VALUES
)


@settings(deadline=None)
@given(st.dictionaries(KEYS, JSON_VALUES), MESSAGES)
def test_no_json_does_anything_but_fail_as_a_400(fields: dict[str, Any], messages: Any) -> None:
    data = json.dumps({"model": "m", "messages": messages, **fields}).encode()
    read = read_or_refused(data)
    if read is not None:
        prompt_text(read)
        assert 0 <= read.text_bytes <= len(data)


@pytest.mark.parametrize(
    "key", ["models", "provider", "api_base", "api_key", "extra_body", "route"]
)
def test_what_chooses_model_price_or_credential_is_refused(key: str) -> None:
    error = refused(body(**{key: "x"}))

    assert (error.param, error.code) == (key, "unsupported_parameter")


@pytest.mark.parametrize("key", ["input_cost_per_token", "output_cost_per_token", "model_info"])
def test_a_price_in_the_body_is_refused(key: str) -> None:
    """LiteLLM takes prices from the body and reports the cost by them."""
    assert refused(body(**{key: 0})).code == "unsupported_parameter"


@pytest.mark.parametrize("key", ["web_search_options", "plugins", "search_parameters"])
def test_what_costs_money_and_has_no_price_is_refused(key: str) -> None:
    assert refused(body(**{key: {}})).code == "unpriced_parameter"
    assert facts(**{key: None}).model == "m"


@pytest.mark.parametrize("tier", ["flex", "priority", "scale", 1])
def test_a_service_tier_with_a_price_of_its_own_is_refused(tier: Any) -> None:
    assert refused(body(service_tier=tier)).code == "unpriced_parameter"


@pytest.mark.parametrize("tier", ["auto", "default", None])
def test_the_usual_service_tiers_pass(tier: Any) -> None:
    assert facts(service_tier=tier).model == "m"


@pytest.mark.parametrize("key", ["MAX_TOKENS", "Model", "maX_toKens", "API_BASE", "\u017ftream"])
def test_a_key_that_some_parsers_take_for_another_is_refused(key: str) -> None:
    """Go's decoder compares keys without case: it would take a limit that was not held for."""
    assert refused(body(**{key: 5})).param == key.casefold()


def test_audio_output_is_seen_however_it_is_written() -> None:
    assert facts(modalities=["text", "audio"]).audio_output
    assert read_facts(b'{"model":"m","modalities":["\\u0061udio"]}').audio_output
    assert not facts(modalities=["text"]).audio_output
    assert refused(body(modalities="audio")).param == "modalities"


def test_images_are_counted_and_are_no_text() -> None:
    text = {"type": "text", "text": "what is this"}
    read = facts(messages=[{"role": "user", "content": [text, IMAGE, IMAGE]}])

    assert read.image_parts == 2
    assert read.text_bytes < len(read.body) - 8000


def test_an_image_with_a_hidden_type_is_an_image() -> None:
    data = body(messages=[{"content": [IMAGE]}])
    read = read_facts(
        data.replace(b'"type"', b'"\\u0074ype"').replace(b"image_url", b"image\\u005furl")
    )

    assert read.image_parts == 1
    assert read.ambiguous


def test_a_single_part_in_place_of_a_list_is_read() -> None:
    assert facts(messages=[{"content": IMAGE}]).image_parts == 1


@pytest.mark.parametrize("kind", ["input_audio", "file", "video_url", "", "tool_reference"])
def test_content_of_a_kind_without_a_price_is_refused(kind: str) -> None:
    error = refused(body(messages=[{"content": [{"type": kind}]}]))

    assert (error.param, error.code) == ("messages", "unpriced_parameter")


@pytest.mark.parametrize("content", [["type", 1], [{"type": 1}], [["type"]]])
def test_malformed_content_is_refused(content: Any) -> None:
    assert (
        refused(body(messages=[{"role": "type", "type": 1, "content": content}])).param
        == "messages"
    )


@pytest.mark.parametrize(
    "data",
    [
        b'{"model":"m","model":"m"}',
        b'{"model":"m","mod\\u0065l":"m"}',
        b'{"model":"m","max_tokens":5,"max_tokens":6}',
        b'{"model":"m","n":1,"\\u006e":2}',
        b'{"model":"m","service_tier":"flex","service_tier":"auto"}',
        b'{"model":"m","plugins":[1],"plugins":null}',
        b'{"model":"m","messages":[],"messages":[]}',
        b'{"model":"m","stream_options":{"include_usage":false,"include_usage":true}}',
    ],
)
def test_a_key_that_is_there_twice_makes_a_body_ambiguous(data: bytes) -> None:
    assert read_facts(data).ambiguous


@pytest.mark.parametrize(
    "text", ['"model": 1, "n": 2', "\\u0061", "<b>\\u003c</b>", "\u0061", "größe 漢字"]
)
def test_text_that_looks_like_keys_makes_no_body_ambiguous(text: str) -> None:
    assert not facts(messages=[{"role": "user", "content": text.replace("\\", "/")}], n=1).ambiguous


def test_the_letters_that_encoders_escape_make_no_body_ambiguous() -> None:
    """Go writes <, > and & as escapes."""
    data = b'{"model":"m","messages":[{"content":"\\u003cb\\u003e \\u0026 \\u2028 \\u00e9"}]}'

    assert not read_facts(data).ambiguous


def test_a_key_of_a_tool_that_is_called_n_is_not_our_n() -> None:
    tool = {"type": "function", "function": {"parameters": {"properties": {"n": {}}}}}

    assert not facts(tools=[tool]).ambiguous


def test_the_prompt_is_all_text_but_no_images() -> None:
    text = {"type": "text", "text": "first"}
    tool = {"type": "function", "function": {"name": "get_fare"}}
    read = facts(messages=[{"role": "user", "content": [text, IMAGE]}], tools=[tool])

    words = prompt_text(read).split("\n")
    assert {"first", "user", "get_fare"} <= set(words)
    assert not any(word.startswith("data:") for word in words)


@pytest.mark.parametrize("value", ["1e999", "9" * 5000, "[" * 500 + "]" * 500])
def test_a_prompt_that_cannot_be_parsed_is_counted_as_it_stands(value: str) -> None:
    """Found: the count failed, and the hold was never ended."""
    message = b'{"role":"user","content":"hello","x":%b}' % value.encode()

    assert "hello" in prompt_text(read_facts(b'{"model":"m","messages":[%b]}' % message))
