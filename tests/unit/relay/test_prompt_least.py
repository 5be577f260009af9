"""What a request costs whose worker dies at once: never more than its prompt."""

import json
from typing import Any

import pytest

from billing.tokens import count_tokens
from gateway.protocols.chat import prompt_text, read_facts
from gateway.relay.afford import prompt_least

SAID = "fare box coin ride gate meter token line north river amber fare"


def message(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("messages", "more"),
    [
        ([message(SAID)], {}),
        ([message("hi")], {"stream": True, "stream_options": {"include_usage": True}}),
        ([message("hi")], {"user": "somebody" * 20, "metadata": {"where": "x" * 400}}),
        ([message("")] * 20, {}),
        ([message([{"type": "text", "text": SAID}])], {"temperature": 0.5}),
    ],
)
def test_the_least_prompt_is_no_more_than_the_counted_one(
    messages: list[dict[str, Any]], more: dict[str, Any]
) -> None:
    """Found: the JSON around the messages was taken for a part of the prompt."""
    facts = read_facts(json.dumps({"model": "m", "messages": messages, **more}).encode())

    assert 1 <= prompt_least(facts) <= count_tokens(prompt_text(facts))


@pytest.mark.parametrize("is_ascii", [True, False])
@pytest.mark.parametrize(
    "said",
    [
        "Где заканчивается эта линия и как туда попасть? ",
        "Достопримечательности законодательства ",
        "Πού τελειώνει αυτή η γραμμή; ",
        "यह लाइन कहाँ समाप्त होती है? ",
        "这条线路的终点在哪里 我怎么去那里 ",
    ],
)
def test_a_prompt_of_another_script_costs_no_more_either(said: str, is_ascii: bool) -> None:
    """Found: written as \\u0431, as many clients do, a letter was taken for most of a token."""
    body = {"model": "m", "messages": [message(said * 60)]}
    facts = read_facts(json.dumps(body, ensure_ascii=is_ascii).encode())
    counted = count_tokens(prompt_text(facts))

    assert counted // 10 < prompt_least(facts) <= counted


def test_an_image_is_no_text_of_the_prompt() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    facts = read_facts(json.dumps({"model": "m", "messages": [message([image])]}).encode())

    assert prompt_least(facts) < 20


def test_a_long_prompt_is_not_free() -> None:
    body = {"model": "m", "messages": [message(" ".join([SAID] * 100))]}
    facts = read_facts(json.dumps(body).encode())
    counted = count_tokens(prompt_text(facts))

    assert counted // 4 < prompt_least(facts) <= counted
