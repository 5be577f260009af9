"""What both Python clients note down: pure functions on the SDK's objects."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import openai

QUESTION: list[Any] = [{"role": "user", "content": "Name a river, then stop."}]


def task() -> dict[str, str]:
    """base_url, api_key, model, bad_key and unknown_model, given by run.py."""
    return dict(json.loads(os.environ["CLIENT_TASK"]))


def answer(text: str, finish: str | None, usage: Any, headers: Any) -> dict[str, Any]:
    noted = usage.model_dump() if usage is not None else None
    return {
        "text": text,
        "finish": finish,
        "usage": noted,
        "cost": (noted or {}).get("cost"),
        "receipt_id": (noted or {}).get("receipt_id"),
        "header_receipt_id": headers.get("x-receipt-id"),
        "header_request_id": headers.get("x-request-id"),
    }


def streamed(chunks: list[Any], headers: Any) -> dict[str, Any]:
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    finish = next((c.finish_reason for c in reversed(choices) if c.finish_reason), None)
    used = next((chunk.usage for chunk in reversed(chunks) if chunk.usage is not None), None)
    return {**answer(text, finish, used, headers), "chunks": len(chunks)}


def models(items: list[Any], wanted: str) -> dict[str, Any]:
    ids = [item.id for item in items]
    return {"count": len(ids), "listed": wanted.partition(":")[0] in {*ids, wanted}, "ids": ids[:5]}


def error(exc: openai.APIError) -> dict[str, Any]:
    return {
        "class": type(exc).__name__,
        "status": getattr(exc, "status_code", None),
        "code": exc.code,
        "type": exc.type,
        "message": exc.message,
        "request_id": getattr(exc, "request_id", None),
    }


def report(client: str, cases: dict[str, Any]) -> None:
    found = {"client": client, "version": openai.__version__, "cases": cases}
    sys.stdout.write(json.dumps(found) + "\n")
