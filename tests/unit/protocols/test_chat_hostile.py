"""Parameters that would cost money unseen, and counts that providers write in other ways."""

import json
from decimal import Decimal

import msgspec
import pytest

from gateway.errors import ApiError
from gateway.protocols.chat import read_facts, upstream_body
from gateway.protocols.chat_answer import read_usage


def body(**fields: object) -> bytes:
    return json.dumps({"model": "m", "messages": [], **fields}).encode()


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": [{"image_url": "https://x/y.png"}]}]},
        {"messages": [{"role": "user", "content": {"image_url": "https://x/y.png"}}]},
        {"tools": [{"type": "web_search"}]},
        {"tools": [{"type": "builtin_function", "function": {"name": "$web_search"}}]},
        {"tools": [{"google_search": {}}]},
        {"modalities": ["image", "text"]},
        {"cache_read_input_token_cost": 0},
        {"Input_Cost_Per_Token": 0},
    ],
)
def test_what_costs_money_unseen_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ApiError) as refused:
        read_facts(body(**fields))

    assert refused.value.status == 400


def test_tools_of_the_client_pass() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}, {"type": "custom"}]

    assert read_facts(body(tools=tools)).model == "m"


def test_other_spellings_of_include_usage_do_not_reach_the_provider() -> None:
    options = {"include_usage": True, "INCLUDE_USAGE": False, "other": 1}

    sent = json.loads(upstream_body(read_facts(body(stream=True, stream_options=options)), "m"))

    assert sent["stream_options"] == {"include_usage": True, "other": 1}


def test_reasoning_beside_the_completion_tokens_is_billed() -> None:
    usage = {
        "prompt_tokens": 20,
        "completion_tokens": 2,
        "total_tokens": 339,
        "completion_tokens_details": {"reasoning_tokens": 317},
    }

    counts = read_usage(msgspec.Raw(json.dumps(usage).encode())).usage

    assert counts is not None
    assert (counts.output_tokens, counts.reasoning_tokens) == (319, 317)


@pytest.mark.parametrize(
    ("details", "reported"),
    [({"upstream_inference_cost": 0.036}, Decimal("0.037")), ({}, None), (None, None)],
)
def test_a_fee_is_not_taken_for_the_cost(details: object, reported: Decimal | None) -> None:
    usage = {"prompt_tokens": 1, "cost": 0.001, "is_byok": True, "cost_details": details}

    assert read_usage(msgspec.Raw(json.dumps(usage).encode())).reported_usd == reported
