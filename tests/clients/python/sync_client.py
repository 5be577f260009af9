"""The blocking OpenAI client of Python, used as its documentation shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import seen
from openai import APIError, OpenAI


def main() -> None:
    task = seen.task()
    with OpenAI(base_url=task["base_url"], api_key=task["api_key"], max_retries=0) as client:
        cases = {
            "complete": complete(client, task["model"]),
            "stream": stream(client, task["model"]),
            "stream_usage": stream(client, task["model"], {"include_usage": True}),
            "models": seen.models(list(client.models.list()), task["model"]),
            "bad_key": failing(
                lambda: complete(client.with_options(api_key=task["bad_key"]), task["model"])
            ),
            "unknown_model": failing(lambda: complete(client, task["unknown_model"])),
            "unknown_model_stream": failing(lambda: stream(client, task["unknown_model"])),
        }
    seen.report("openai-python", cases)


def complete(client: OpenAI, model: str) -> dict[str, Any]:
    raw = client.chat.completions.with_raw_response.create(model=model, messages=seen.QUESTION)
    answer = raw.parse()
    choice = answer.choices[0]
    text = choice.message.content or ""
    return seen.answer(text, choice.finish_reason, answer.usage, raw.headers)


def stream(client: OpenAI, model: str, options: Any = None) -> dict[str, Any]:
    more = {"stream_options": options} if options else {}
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=seen.QUESTION, stream=True, **more
    )
    return seen.streamed(list(raw.parse()), raw.headers)


def failing(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"error": None, "answer": call()}
    except APIError as exc:
        return {"error": seen.error(exc)}


if __name__ == "__main__":
    main()
