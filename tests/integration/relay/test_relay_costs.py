"""The cost oracle: what each kind of answer costs and is charged, computed by hand.

Rates and markup stand in tests/support: $1 in, $0.50 cached, $4 out for a million tokens, times 2.
"""

from fractions import Fraction
from typing import Any

import pytest
import tiktoken

from billing.tokens import count_tokens
from gateway.protocols.chat import prompt_text, read_facts
from tests.support.gateway import PRICE, zoo_model
from tests.support.relay import (
    Relay,
    Tokens,
    cost_by_hand,
    error_of,
    frames_of,
    nanos_by_hand,
    price_by_hand,
    text_of,
    zoo,
)
from tests.support.upstream.launch import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

USED = "prompt=11,tokens=7"
REPORTED = ["0.00012345", "1e-7", "0", "0.1", "0.0000000001", "0.000123456789123456789"]
HEADER_COSTS = ["0.0004", "3.5e-05"]
REFUSED_COSTS = ["-0.5", "null", "true", '"NaN"', "9e99", "[]"]
NOT_BELIEVED = ["no-usage", "null-usage", "negative-usage", "huge-usage", "bool-usage"]
NOT_BELIEVED += ["string-usage", "float-usage"]
SPLIT = "plain:prompt=1000,cached=400,tokens=30,reasoning=20"

MODELS = zoo(
    f"plain:{USED}",
    SPLIT,
    "plain:prompt=1,tokens=0",
    "zero-usage",
    f"usage-twice:{USED}",
    f"usage-every-chunk:{USED}",
    f"usage-in-last-choice:{USED}",
    "above-max-tokens:prompt=11,tokens=900",
    *(f"cost:{usd},{USED}" for usd in (*REPORTED, *REFUSED_COSTS)),
    *(f"header-cost:{usd},{USED}" for usd in HEADER_COSTS),
    *(f"{mode}:{USED}" for mode in NOT_BELIEVED),
)
MODELS["reasoning"] = zoo_model(
    "plain:prompt=10,tokens=3,reasoning=4", price={**PRICE, "reasoning_usd_per_mtok": "9"}
)
MODELS["marked-up"] = zoo_model(f"plain:{USED}", markup_bps=12_345)
MODELS["unpriced"] = {"routes": [{"provider": "zoo", "model": "plain"}]}

STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


async def paid(relay: Relay, key: str, model: str, **fields: Any) -> tuple[Any, dict[str, Any]]:
    """(usage as the client saw it, the receipt); both say the same, and so does the ledger."""
    if fields.get("stream"):
        fields.setdefault("stream_options", {"include_usage": True})
    outcome = await relay.call(key, model, **fields)
    assert outcome.status == 200, outcome.body
    usage = frames_of(outcome)[-1]["usage"] if fields.get("stream") else outcome.json()["usage"]
    receipt = await relay.only_receipt(key)
    assert usage["cost_nanos"] == receipt["price_nanos"] == await relay.spent(key)
    assert Fraction(str(usage["cost"])) * 10**9 == receipt["price_nanos"]
    assert outcome.head is not None
    assert usage["receipt_id"] == outcome.head.get("x-receipt-id")
    assert receipt["outcome"] == "complete"
    return usage, receipt


@STREAMED
@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        (f"plain:{USED}", Tokens(prompt=11, completion=7)),
        ("plain:prompt=1,tokens=0", Tokens(prompt=1, completion=0)),
        (SPLIT, Tokens(prompt=1000, cached=400, completion=50, reasoning=20)),
        ("zero-usage", Tokens(prompt=0, completion=0)),
        (f"usage-twice:{USED}", Tokens(prompt=11, completion=7)),
    ],
)
async def test_counts_of_the_provider_cost_what_the_price_book_says(
    relay: Relay, key: str, model: str, tokens: Tokens, stream: bool
) -> None:
    """Found: of two usage frames the first, of one token, was charged."""
    usage, receipt = await paid(relay, key, model, stream=stream)

    assert (receipt["usage_source"], receipt["cost_source"]) == ("provider", "price_book")
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (
        tokens.prompt,
        tokens.completion,
    )
    assert receipt["input_tokens"] == tokens.prompt
    assert receipt["cached_tokens"] == tokens.cached
    assert receipt["output_tokens"] == tokens.completion
    assert receipt["reasoning_tokens"] == tokens.reasoning
    assert receipt["provider_cost_nanos"] == nanos_by_hand(cost_by_hand(tokens))
    assert receipt["price_nanos"] == price_by_hand(tokens)


@pytest.mark.parametrize("mode", ["usage-every-chunk", "usage-in-last-choice"])
async def test_usage_beside_text_is_charged_by_its_last_word(
    relay: Relay, key: str, mode: str
) -> None:
    usage, receipt = await paid(relay, key, f"{mode}:{USED}", stream=True)

    assert receipt["price_nanos"] == price_by_hand(Tokens(prompt=11, completion=7))
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (11, 7)


async def test_reasoning_tokens_have_their_own_price(relay: Relay, key: str) -> None:
    _, receipt = await paid(relay, key, "reasoning")

    tokens = Tokens(prompt=10, completion=7, reasoning=4)
    assert receipt["provider_cost_nanos"] == nanos_by_hand(cost_by_hand(tokens, Fraction(9)))


async def test_the_markup_of_a_model_is_rounded_once(relay: Relay, key: str) -> None:
    _, receipt = await paid(relay, key, "marked-up")

    cost = cost_by_hand(Tokens(prompt=11, completion=7))
    assert receipt["price_nanos"] == nanos_by_hand(cost, Fraction(12_345, 10_000))
    assert receipt["markup_bps"] == 12_345


@STREAMED
@pytest.mark.parametrize("usd", REPORTED)
async def test_a_reported_cost_is_preferred_to_the_price_book(
    relay: Relay, key: str, usd: str, stream: bool
) -> None:
    """The account has a dollar; the hold caps the price, what is above it is the operator's."""
    usage, receipt = await paid(relay, key, f"cost:{usd},{USED}", stream=stream)

    price = nanos_by_hand(Fraction(usd), Fraction(2))
    assert receipt["cost_source"] == "provider"
    assert receipt["provider_cost_nanos"] == nanos_by_hand(Fraction(usd))
    assert receipt["price_nanos"] == min(price, receipt["hold_nanos"])
    assert receipt["overrun_nanos"] == price - receipt["price_nanos"]
    assert Fraction(receipt["reported_cost_usd"]) == Fraction(usd)
    assert "cost_details" not in usage


@STREAMED
@pytest.mark.parametrize("usd", HEADER_COSTS)
async def test_a_cost_in_litellms_header_is_a_reported_cost(
    relay: Relay, key: str, usd: str, stream: bool
) -> None:
    _, receipt = await paid(relay, key, f"header-cost:{usd},{USED}", stream=stream)

    assert receipt["cost_source"] == "provider"
    assert receipt["price_nanos"] == nanos_by_hand(Fraction(usd), Fraction(2))


@pytest.mark.parametrize("usd", REFUSED_COSTS)
async def test_a_cost_that_is_no_money_leaves_the_price_book(
    relay: Relay, key: str, usd: str
) -> None:
    _, receipt = await paid(relay, key, f"cost:{usd},{USED}")

    assert receipt["cost_source"] == "price_book"
    assert receipt["price_nanos"] == price_by_hand(Tokens(prompt=11, completion=7))


@STREAMED
@pytest.mark.parametrize("mode", NOT_BELIEVED)
async def test_usage_that_is_missing_or_absurd_is_counted_and_marked(
    relay: Relay, key: str, mode: str, stream: bool
) -> None:
    """Found: absurd usage of a whole answer was charged without the text of the answer."""
    request = relay.chat(key, f"{mode}:{USED}", stream=stream)
    outcome = await relay.send(request)
    receipt = await relay.only_receipt(key)

    if stream:
        text = text_of(frames_of(outcome))
    else:
        text = outcome.json()["choices"][0]["message"]["content"]
    prompt = count_tokens(prompt_text(read_facts(request.body)))
    encoding = tiktoken.get_encoding("o200k_base")
    tokens = Tokens(prompt=prompt, completion=len(encoding.encode(text)))
    content = len(encoding.encode("Where does this line end?"))
    assert content < tokens.prompt <= content + 12
    assert tokens.completion >= 7
    assert receipt["usage_source"] == "counted"
    assert (receipt["input_tokens"], receipt["output_tokens"]) == (tokens.prompt, tokens.completion)
    assert receipt["price_nanos"] == price_by_hand(tokens)


@STREAMED
@pytest.mark.parametrize("mode", ["no-usage", "huge-usage", "string-usage"])
async def test_a_client_is_told_our_count_instead_of_absurd_usage(
    relay: Relay, key: str, mode: str, stream: bool
) -> None:
    """Found: the client was shown the provider's absurd counts beside our price."""
    usage, receipt = await paid(relay, key, f"{mode}:{USED}", stream=stream)

    assert usage["prompt_tokens"] == receipt["input_tokens"]
    assert usage["completion_tokens"] == receipt["output_tokens"]
    assert usage["total_tokens"] == receipt["input_tokens"] + receipt["output_tokens"]


async def test_what_is_billed_above_the_hold_is_the_operators(relay: Relay, key: str) -> None:
    _, receipt = await paid(relay, key, "above-max-tokens:prompt=11,tokens=900", max_tokens=8)

    price = price_by_hand(Tokens(prompt=11, completion=900))
    assert receipt["price_nanos"] == receipt["hold_nanos"] < price
    assert receipt["overrun_nanos"] == price - receipt["hold_nanos"]


async def test_the_hold_covers_bytes_in_and_all_that_may_come_out(relay: Relay, key: str) -> None:
    request = relay.chat(key, f"plain:{USED}", max_tokens=100, n=3)
    await relay.send(request)
    receipt = await relay.only_receipt(key)

    least = nanos_by_hand((len(request.body) * 1 + Fraction(300) * 4) / 10**6, Fraction(2))
    assert least <= receipt["hold_nanos"] <= least + 200 * 2000
    assert receipt["price_nanos"] == price_by_hand(Tokens(prompt=11, completion=21))


async def test_a_model_without_a_price_is_refused(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    error = error_of(await relay.call(key, "unpriced"))

    assert (error["code"], error["param"]) == ("unpriced_model", "model")
    assert upstream.stats()["requests"] == 0
    assert await relay.receipts(key, 0) == []
