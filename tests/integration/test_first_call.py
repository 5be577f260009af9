"""The thin line: a key, a call, a receipt."""

import openai

from tests.support.gateway import Gateway


async def test_a_call_leaves_one_receipt_and_one_ledger_row(gateway: Gateway) -> None:
    key = await gateway.key(credits="1000")
    async with openai.AsyncOpenAI(base_url=gateway.base_url, api_key=key) as client:
        raw = await client.chat.completions.with_raw_response.create(
            model="plain", messages=[{"role": "user", "content": "hello"}]
        )
    answer = raw.parse()

    assert answer.usage is not None
    receipt = await gateway.receipt(raw.headers["x-receipt-id"])
    assert receipt["input_tokens"] == answer.usage.prompt_tokens
    assert receipt["output_tokens"] == answer.usage.completion_tokens
    cost = answer.usage.prompt_tokens * 10**9 + answer.usage.completion_tokens * 4 * 10**9
    assert receipt["provider_cost_nanos"] == cost // 10**6
    assert receipt["price_nanos"] == 2 * cost // 10**6
    row = await gateway.pool.fetchrow("SELECT * FROM credit_ledger WHERE reason = 'charge'")
    assert row is not None
    assert row["amount_nanos"] == -receipt["price_nanos"]
    assert row["balance_after_nanos"] == 10**9 - receipt["price_nanos"]


async def test_a_stream_leaves_one_receipt(gateway: Gateway) -> None:
    key = await gateway.key()
    async with openai.AsyncOpenAI(base_url=gateway.base_url, api_key=key) as client:
        stream = await client.chat.completions.create(
            model="plain",
            messages=[{"role": "user", "content": "hello"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]

    usage = chunks[-1].usage
    assert usage is not None
    (receipt,) = await gateway.receipts(1)
    assert receipt["price_nanos"] == (usage.model_extra or {})["cost_nanos"]
    assert receipt["outcome"] == "complete"
