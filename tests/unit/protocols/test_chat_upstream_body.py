"""What goes to the provider: the client's bytes, but for what money and routing need."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.protocols.chat import read_facts, upstream_body

MESSAGES = b'"messages" : [ {"role":"user", "content":"h\xc3\xa9llo \\n"} ]'


def sent(data: bytes, model: str = "m") -> bytes:
    return upstream_body(read_facts(data), model)


def test_a_body_that_needs_no_change_keeps_its_bytes() -> None:
    data = b'{ "model" :"m",\n ' + MESSAGES + b', "seed": 1e2, "x":{"y":[1,2.50]} }'

    assert sent(data) == data


def test_a_stream_that_asked_for_usage_keeps_its_bytes() -> None:
    data = b'{"model":"m","stream":true, "stream_options": {"include_usage": true}}'

    assert sent(data) == data


def test_usage_is_asked_for_in_every_stream() -> None:
    for options in (b"", b',"stream_options":null', b',"stream_options":{"include_usage":false}'):
        got = json.loads(sent(b'{"model":"m","stream":true' + options + b"}"))

        assert got == {"model": "m", "stream": True, "stream_options": {"include_usage": True}}


def test_other_stream_options_stay() -> None:
    got = json.loads(sent(b'{"model":"m","stream":true,"stream_options":{"a":1.50}}'))

    assert got["stream_options"] == {"a": 1.5, "include_usage": True}


def test_usage_is_not_asked_for_without_a_stream() -> None:
    data = b'{"model":"m","stream":false}'

    assert sent(data) == data


def test_the_model_gets_its_name_at_the_provider_and_all_else_keeps_its_bytes() -> None:
    data = b'{"model":"m",' + MESSAGES + b',"x":{"y": [1,2.50,1E2]}}'

    got = sent(data, 'org/"m"')

    assert json.loads(got) == {**json.loads(data), "model": 'org/"m"'}
    for kept in (b'[ {"role":"user", "content":"h\xc3\xa9llo \\n"} ]', b'{"y": [1,2.50,1E2]}'):
        assert kept in got


def test_a_key_that_is_there_twice_goes_out_once_as_it_was_read() -> None:
    got = sent(b'{"model":"m","max_tokens":5,"n":1,"max_tok\\u0065ns":6,"n":2}')

    assert got.count(b"max_tok") == 1
    assert json.loads(got) == {"model": "m", "max_tokens": 6, "n": 2}


def test_doubled_stream_options_ask_for_usage_however_they_are_read() -> None:
    """Found: a provider that takes the first of two keys would have sent no usage."""
    options = b'"stream_options":{"include_usage":false,"include_usage":true}'
    got = sent(b'{"model":"m","stream":true,' + options + b"}")

    assert got.count(b"include_usage") == 1
    assert json.loads(got)["stream_options"] == {"include_usage": True}


@settings(deadline=None)
@given(
    st.dictionaries(
        # LiteLLM's own prices are refused.
        st.text(max_size=6).filter(lambda name: "_cost" not in f"x{name}".casefold()),
        st.none()
        | st.integers(-1000, 1000)
        | st.text()
        | st.lists(st.floats(allow_nan=False, allow_infinity=False)),
    ),
    st.booleans(),
)
def test_unknown_fields_reach_the_provider_unchanged(fields: dict[str, Any], stream: bool) -> None:
    kept = {f"x{name}": value for name, value in fields.items()}
    data = json.dumps({"model": "m", "stream": stream, **kept}).encode()

    got = json.loads(sent(data, "other"))

    assert {name: got[name] for name in kept} == kept


def lowered(data: bytes) -> dict[str, Any]:
    return dict(json.loads(upstream_body(read_facts(data), "m", 7)))


def test_a_lowered_output_takes_the_place_of_the_limit_that_the_client_used() -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        assert lowered(b'{"model":"m","%b":100}' % name.encode()) == {"model": "m", name: 7}


def test_a_lowered_output_is_asked_for_by_its_newer_name_when_the_client_used_none() -> None:
    assert lowered(b'{"model":"m"}') == {"model": "m", "max_completion_tokens": 7}
    got = lowered(b'{"model":"m","max_tokens":null}')
    assert got == {"model": "m", "max_tokens": None, "max_completion_tokens": 7}


def test_of_two_limits_none_is_raised() -> None:
    got = lowered(b'{"model":"m","max_tokens":5,"max_completion_tokens":100}')

    assert got == {"model": "m", "max_tokens": 5, "max_completion_tokens": 7}


def test_a_lowered_output_leaves_no_second_spelling_of_the_limit() -> None:
    """A parser that takes the first of two equal keys would not be bound by it."""
    body = upstream_body(
        read_facts(b'{"model":"m","max_tokens":90,"max_tok\\u0065ns":100}'), "m", 7
    )

    assert body.count(b"max_tok") == 1
    assert json.loads(body)["max_tokens"] == 7
