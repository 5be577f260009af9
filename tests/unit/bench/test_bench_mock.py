"""The mock as the OpenAI SDK sees it, and as a hostile or hurried client does."""

import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import openai
import pytest

from bench.arms import running_mock
from bench.mock import Counts
from bench.shape import DEFAULT, Shape, chat_body, read_shape
from bench.wire import BadAnswer, dechunk, http_chunk


@pytest.fixture
async def mock(tmp_path: Path) -> AsyncIterator[str]:
    async with running_mock(tmp_path, seed=1) as (_, url):
        yield url


def counts(mock: str) -> Counts:
    return msgspec.json.decode(httpx.get(f"{mock}/mock/stats").content, type=Counts)


def ask(mock: str, shape: Shape, **more: Any) -> Any:
    with openai.OpenAI(base_url=f"{mock}/v1", api_key="k", max_retries=0) as client:
        message = {"role": "user", "content": f"{shape.directive()} hello"}
        answer = client.chat.completions.create(model="bench", messages=[message], **more)  # type: ignore[list-item]
        return list(answer) if more.get("stream") else answer


def test_a_plain_answer_is_what_the_sdk_expects(mock: str) -> None:
    answer = ask(mock, Shape(answer_bytes=100))

    assert answer.model == "bench"
    assert 80 < len(answer.choices[0].message.content) <= 100
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert ask(mock, Shape(answer_bytes=100)).choices == answer.choices
    said = counts(mock)
    assert (said.requests, said.served, said.ended) == (2, 2, 2)
    assert said.output_tokens == 2 * answer.usage.completion_tokens


@pytest.mark.parametrize("every_ms", [0, 2])
def test_a_stream_has_its_chunks_usage_and_end(mock: str, every_ms: int) -> None:
    chunks = ask(
        mock,
        Shape(chunks=7, every_ms=every_ms),
        stream=True,
        stream_options={"include_usage": True},
    )

    texts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert [int(text[1:].partition(":")[0]) for text in texts] == list(range(7))
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == 7
    said = counts(mock)
    assert (said.frames, said.served, said.ended, said.gone) == (7, 1, 1, 0)


def test_no_usage_is_sent_when_nobody_asked(mock: str) -> None:
    chunks = ask(mock, Shape(chunks=2), stream=True)

    assert all(chunk.usage is None for chunk in chunks)
    assert counts(mock).output_tokens == 0


def test_errors_are_the_kind_that_was_asked_for(mock: str) -> None:
    with pytest.raises(openai.RateLimitError):
        ask(mock, Shape(status=429))
    with pytest.raises(openai.InternalServerError):
        ask(mock, Shape(status=503))

    said = counts(mock)
    assert (said.requests, said.served, said.errors) == (2, 0, 2)


def test_a_cut_stream_breaks_off(mock: str) -> None:
    with pytest.raises(openai.APIConnectionError):
        ask(mock, Shape(chunks=9, cut_after=3), stream=True)

    said = counts(mock)
    assert (said.frames, said.cut, said.ended) == (3, 1, 0)


@pytest.mark.parametrize("after", [0, 2])
def test_a_stalled_stream_says_nothing_more(mock: str, after: int) -> None:
    body = chat_body("bench", 400, Shape(chunks=9, stall_after=after), stream=True, seed=1)
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.stream("POST", f"{mock}/v1/chat/completions", content=body, timeout=0.2) as answer,
    ):
        answer.read()

    said = counts(mock)
    assert (said.stalled, said.frames, said.gone) == (1, after, 1)


def test_pipelined_requests_are_answered_in_order(mock: str) -> None:
    address = urlsplit(mock)
    shapes = [Shape(chunks=3, every_ms=2), Shape(chunks=2), Shape(first_ms=5), Shape(status=500)]
    sent = b""
    for number, shape in enumerate(shapes):
        body = chat_body("bench", 300, shape, stream=number < 2, seed=1)
        head = b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body)
        sent += head + body
    sent += b"GET /v1/models HTTP/1.1\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=5) as sock:
        for at in range(0, len(sent), 77):
            sock.sendall(sent[at : at + 77])
        got = b""
        while b'"object":"list"' not in got:
            got += sock.recv(65536)

    assert [int(part[:3]) for part in got.split(b"HTTP/1.1 ")[1:]] == [200, 200, 200, 500, 200]
    assert got.count(b"[DONE]") == 2
    assert counts(mock).frames == 5


def test_a_chunked_request_body_is_read(mock: str) -> None:
    body = chat_body("bench", 5000, Shape(answer_bytes=50), stream=False, seed=1)
    pieces = (body[at : at + 999] for at in range(0, len(body), 999))
    answer = httpx.post(f"{mock}/v1/chat/completions", content=pieces)

    assert len(answer.json()["choices"][0]["message"]["content"]) <= 50


def test_what_is_no_request_gets_an_error(mock: str) -> None:
    url = f"{mock}/v1/chat/completions"

    assert httpx.post(url, content=b"{").status_code == 400
    assert httpx.post(url, content=b"[]").status_code == 400
    assert httpx.get(f"{mock}/nothing").status_code == 404


def test_a_prompt_has_the_size_that_was_asked_for() -> None:
    for size in (1024, 32 * 1024, 200 * 1024):
        body = chat_body("bench", size, Shape(chunks=3), stream=True, seed=1)
        assert size - 2 <= len(body) <= size
        assert json.loads(body)["stream"] is True
        assert read_shape(body).chunks == 3


def test_a_directive_says_only_what_is_known() -> None:
    assert read_shape(Shape(chunks=5, every_ms=20).directive().encode()).every_ms == 20
    assert read_shape(b"no directive") == DEFAULT
    assert read_shape(b"[[mock chunks=x evil=1 status=99999]]").status == 500
    assert read_shape(b"[[mock chunks=999999999999]]").chunks == 100_000


def test_chunks_are_put_together_wherever_they_were_cut() -> None:
    whole = http_chunk(b"hello") + http_chunk(b"world" * 10) + b"0\r\n\r\n"
    for cut in range(len(whole)):
        first, end, over = dechunk(whole[:cut])
        assert not over
        second, _, over = dechunk(whole[end:])
        assert (first + second, over) == (b"hello" + b"world" * 10, True)
    with pytest.raises(BadAnswer):
        dechunk(b"nothing\r\n")
