"""The asyncio OpenAI client of Python: unlike the blocking one it drains a stream to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import seen
from openai import APIError, AsyncOpenAI


async def main() -> None:
    task = seen.task()
    model, unknown = task["model"], task["unknown_model"]
    async with AsyncOpenAI(
        base_url=task["base_url"], api_key=task["api_key"], max_retries=0
    ) as client:
        stranger = client.with_options(api_key=task["bad_key"])
        cases = {
            "complete": await complete(client, model),
            "stream": await stream(client, model),
            "stream_usage": await stream(client, model, {"include_usage": True}),
            "models": seen.models([item async for item in client.models.list()], model),
            "bad_key": await failing(complete(stranger, model)),
            "unknown_model": await failing(complete(client, unknown)),
            "unknown_model_stream": await failing(stream(client, unknown)),
        }
    seen.report("openai-python-async", cases)


async def complete(client: AsyncOpenAI, model: str) -> dict[str, Any]:
    raw = await client.chat.completions.with_raw_response.create(
        model=model, messages=seen.QUESTION
    )
    answer = raw.parse()
    choice = answer.choices[0]
    text = choice.message.content or ""
    return seen.answer(text, choice.finish_reason, answer.usage, raw.headers)


async def stream(client: AsyncOpenAI, model: str, options: Any = None) -> dict[str, Any]:
    more = {"stream_options": options} if options else {}
    raw = await client.chat.completions.with_raw_response.create(
        model=model, messages=seen.QUESTION, stream=True, **more
    )
    return seen.streamed([chunk async for chunk in raw.parse()], raw.headers)


async def failing(call: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"error": None, "answer": await call}
    except APIError as exc:
        return {"error": seen.error(exc)}


if __name__ == "__main__":
    asyncio.run(main())
