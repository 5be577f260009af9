"""The tools themselves: the provider has OpenAI's shapes, and the raw client says what it saw."""

import asyncio
import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.support.rawclient import Ended, Leave, Outcome, Reading, chat, connect, exchange
from tests.support.upstream.launch import ROOT, Upstream, running_upstream

MESSAGES: list[Any] = [{"role": "user", "content": "Where does the north line end?"}]
STREAM: dict[str, Any] = {"stream": True}
WITH_USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
HEADERS = {"authorization": "Bearer upstream-key"}


@pytest.fixture(scope="module")
def _process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    folder: Path = tmp_path_factory.mktemp("upstream")
    with running_upstream(folder) as running:
        yield running


@pytest.fixture
def upstream(_process: Upstream) -> Iterator[Upstream]:
    _process.reset()
    yield _process
    assert _process.stats()["errors"] == []


@pytest.fixture
def sdk(upstream: Upstream) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=upstream.base_url, api_key=upstream.api_key, max_retries=0
    ) as client:
        yield client


def ask(upstream: Upstream, model: str, **more: Any) -> httpx.Response:
    body = {"model": model, "messages": MESSAGES, **more}
    url = f"{upstream.base_url}/chat/completions"
    return httpx.post(url, json=body, headers=HEADERS, timeout=20)


def payloads(response: httpx.Response) -> list[Any]:
    found = [ln.removeprefix("data: ") for ln in response.text.splitlines() if "data: " in ln]
    return [json.loads(text) if text != "[DONE]" else text for text in found]


async def raw(upstream: Upstream, model: str, more: dict[str, Any], **options: Any) -> Outcome:
    request = chat(upstream.api_key, {"model": model, "messages": MESSAGES, **more})
    return await exchange(upstream.base_url, request, **options)


def test_streamed_and_whole_text_agree_and_end_at_max_tokens(sdk: openai.OpenAI) -> None:
    whole = sdk.chat.completions.create(model="plain:tokens=9", messages=MESSAGES, max_tokens=5)
    stream = sdk.chat.completions.create(
        model="plain:tokens=9", messages=MESSAGES, max_tokens=5, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert text == whole.choices[0].message.content
    assert len(text.split()) == 5
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 5


def test_usage_details_are_as_asked(sdk: openai.OpenAI) -> None:
    model = "plain:tokens=4,prompt=100,cached=60,reasoning=7"
    usage = sdk.chat.completions.create(model=model, messages=MESSAGES).usage

    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (100, 11, 111)
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 60
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == 7


def test_usage_chunk_comes_only_when_asked_for(upstream: Upstream) -> None:
    without = payloads(ask(upstream, "plain", **STREAM))
    asked = payloads(ask(upstream, "plain", **WITH_USAGE))

    assert without[-1] == asked[-1] == "[DONE]"
    assert all("usage" not in item for item in without[:-1])
    assert all(item["usage"] is None for item in asked[:-2])
    assert asked[-2]["choices"] == []
    assert asked[-2]["usage"]["completion_tokens"] == 32


def test_cost_keeps_its_digits(upstream: Upstream) -> None:
    assert '"cost": 0.00120' in ask(upstream, "cost:0.00120").text
    assert '"cost":1e-7}' in ask(upstream, "cost:1e-7", **WITH_USAGE).text
    assert ask(upstream, "header-cost:0.5").headers["x-litellm-response-cost"] == "0.5"


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("no-usage", "absent"),
        ("null-usage", None),
        ("zero-usage", 0),
        ("negative-usage", -33),
        ("huge-usage", 2**63),
        ("bool-usage", True),
        ("string-usage", "32"),
        ("float-usage", 32.5),
    ],
)
def test_wrong_usage_is_wrong_in_both_forms(
    upstream: Upstream, mode: str, expected: object
) -> None:
    whole = ask(upstream, mode).json()
    last = payloads(ask(upstream, mode, **WITH_USAGE))[-2]

    for found in (whole, last):
        usage = found.get("usage", {"completion_tokens": "absent"}) or {}
        assert usage.get("completion_tokens") == expected
        assert type(usage.get("completion_tokens")) is type(expected)


def test_usage_may_come_twice_or_in_every_chunk_or_with_choices(upstream: Upstream) -> None:
    def counts(mode: str) -> list[int]:
        items = payloads(ask(upstream, mode, **WITH_USAGE))[:-1]
        return [item["usage"]["completion_tokens"] for item in items if item.get("usage")]

    assert counts("usage-twice:tokens=4") == [1, 4]
    assert counts("usage-every-chunk:tokens=4") == [0, 1, 2, 3, 4, 4]
    assert counts("usage-in-last-choice:tokens=4") == [4]
    assert ask(upstream, "usage-twice").text.count('"usage"') == 2
    assert ask(upstream, "above-max-tokens", max_tokens=3).json()["usage"]["completion_tokens"] == 6


def test_the_end_of_a_stream_may_be_missing_or_not_the_end(upstream: Upstream) -> None:
    missing = payloads(ask(upstream, "no-done", **STREAM))
    beyond = payloads(ask(upstream, "after-done", **STREAM))

    assert "[DONE]" not in missing
    assert beyond.count("[DONE]") == 2
    assert beyond[-2]["choices"][0]["delta"]["content"] == " AFTER DONE"


def test_errors_come_in_status_200(upstream: Upstream) -> None:
    whole = ask(upstream, "error-in-200")
    first = payloads(ask(upstream, "error-in-200", **STREAM))
    middle = payloads(ask(upstream, "error-in-200:after=3,done=0", **STREAM))

    assert whole.status_code == 200
    assert whole.json() == first[0] == middle[-1]
    assert (len(first), len(middle)) == (2, 5)
    assert ask(upstream, "html-200").headers["content-type"] == "text/html"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 503])
def test_the_sdk_reads_error_statuses(sdk: openai.OpenAI, status: int) -> None:
    with pytest.raises(openai.APIStatusError, match=f"The upstream says {status}") as caught:
        sdk.chat.completions.create(model=f"status:{status}", messages=MESSAGES)

    assert caught.value.status_code == status


def test_refusals_are_openais(upstream: Upstream, sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.chat.completions.create(model="nonsense", messages=MESSAGES)
    with pytest.raises(openai.AuthenticationError) as unknown:
        sdk.with_options(api_key="wrong").models.list()

    assert missing.value.code == "model_not_found"
    assert unknown.value.code == "invalid_api_key"
    assert ask(upstream, "plain:toknes=3").status_code == 400
    assert ask(upstream, "status-html:502").text.startswith("<!doctype")
    assert ask(upstream, "status:429:").status_code == 400
    assert ask(upstream, "status:429,retry_after=2").headers["retry-after"] == "2"
    assert ask(upstream, "redirect").status_code == 307
    assert "plain" in [model.id for model in sdk.models.list()]


def test_the_sdk_reads_tools_reasoning_comments_and_odd_framing(sdk: openai.OpenAI) -> None:
    def text(model: str) -> str:
        stream = sdk.chat.completions.create(model=model, messages=MESSAGES, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    call = sdk.chat.completions.create(model="tools", messages=MESSAGES).choices[0]
    deltas = sdk.chat.completions.create(model="tools", messages=MESSAGES, stream=True)
    arguments = ""
    for chunk in deltas:
        for part in chunk.choices[0].delta.tool_calls or []:
            arguments += (part.function and part.function.arguments) or ""

    assert call.message.tool_calls is not None
    assert json.loads(arguments) == {"from": "north", "to": "river"}
    assert text("split-utf8") == "é漢🙂ß字🚋" * 4
    for mode in ("reasoning-text", "comments", "crlf", "gzip"):
        assert len(text(f"{mode}:tokens=6").split()) == 6
    assert len(text("one-byte").split()) == 4


async def test_crlf_gzip_and_wrong_content_types_are_on_the_wire(upstream: Upstream) -> None:
    crlf = await raw(upstream, "crlf", STREAM)
    packed = await raw(upstream, "gzip", STREAM)
    plain = await raw(upstream, "plain", {})
    swapped = await raw(upstream, "json-for-sse", STREAM)
    other = await raw(upstream, "sse-for-json", {})

    assert crlf.body.count(b"\r\n\r\n") == len(crlf.frames())
    assert gzip.decompress(packed.body).endswith(b"data: [DONE]\n\n")
    assert plain.json()["object"] == swapped.json()["object"] == "chat.completion"
    assert other.frames()[-1] == "[DONE]"


async def test_multibyte_letters_are_split_and_bytes_come_alone(upstream: Upstream) -> None:
    split = await raw(upstream, "split-utf8:tokens=2", STREAM)
    single = await raw(upstream, "one-byte:tokens=2", STREAM)

    assert any(piece.data[-1] >= 0xC0 for piece in split.pieces)
    assert {len(piece.data) for piece in single.pieces} == {1}
    times = [piece.at for piece in split.pieces]
    assert times == sorted(times)


async def test_a_big_frame_is_one_line(upstream: Upstream) -> None:
    out = await raw(upstream, "big-frame:bytes=3000000", WITH_USAGE)

    assert max(len(frame) for frame in out.frames()) > 3_000_000
    assert json.loads(out.frames()[-2])["usage"]["completion_tokens"] == 750_000


async def test_broken_answers_end_as_they_say(upstream: Upstream) -> None:
    cut = await raw(upstream, "cut:after=3", STREAM)
    half = await raw(upstream, "cut", {})
    reset = await raw(upstream, "refuse-close:rst=1", {})
    refused = await raw(upstream, "refuse-close", {})

    assert (cut.ended, len(cut.frames())) == (Ended.EOF, 4)
    assert half.ended is Ended.EOF
    assert half.head is not None
    assert len(half.body) == int(half.head.get("content-length") or 0) // 2
    assert (reset.ended, refused.ended) == (Ended.RESET, Ended.EOF)
    assert upstream.wait(lambda s: s["cut_by_us"] == 4)["served"] == 0


async def test_stalls_last_until_the_peer_leaves(upstream: Upstream) -> None:
    with pytest.raises(TimeoutError):
        await raw(upstream, "stall-head", {}, deadline=0.3)
    with pytest.raises(TimeoutError):
        await raw(upstream, "stall-body:after=2", STREAM, deadline=0.3)

    stats = upstream.wait(lambda s: s["aborted_by_peer"] == 2 and s["open_connections"] == 0)
    assert (stats["streams_started"], stats["in_flight"]) == (1, 0)


@pytest.mark.parametrize("leave", list(Leave))
@pytest.mark.parametrize("at", [1, 400, 5000])
async def test_leaving_an_endless_stream_is_seen(upstream: Upstream, leave: Leave, at: int) -> None:
    out = await raw(upstream, "endless", STREAM, cut_after_bytes=at, leave=leave)

    assert (out.ended, out.raw_bytes) == (Ended.CUT, at)
    assert upstream.wait(lambda s: s["aborted_by_peer"] == 1)["open_connections"] == 0


async def test_leaving_before_the_answer_and_within_the_request(upstream: Upstream) -> None:
    written = await raw(upstream, "plain:delay_ms=5000", {}, cut_after_bytes=0)
    upstream.wait(lambda s: s["aborted_by_peer"] == 1)
    upstream.reset()
    await raw(upstream, "plain", {}, cut_after_bytes=-10, leave=Leave.CLOSE)

    assert written.ended is Ended.CUT
    # Nothing complete arrived, so no request was counted: that is an entry in errors.
    assert upstream.wait(lambda s: s["errors"])["requests"] == 0
    upstream.reset()


async def test_a_half_closed_client_counts_as_gone(upstream: Upstream) -> None:
    out = await raw(upstream, "plain:delay_ms=5000", {}, half_close=True)

    assert (out.ended, out.head) == (Ended.EOF, None)
    assert upstream.wait(lambda s: s["aborted_by_peer"] == 1)["served"] == 0


async def test_a_slow_reader_holds_back_the_provider(upstream: Upstream) -> None:
    reading = Reading(rcvbuf=4096, rate=400_000, size=4096)
    out = await raw(upstream, "big-frame:bytes=200000", STREAM, reading=reading)

    assert out.ended is Ended.COMPLETE
    assert out.pieces[-1].at - out.pieces[0].at > 0.4


async def test_one_connection_serves_many_requests_and_half_close_ends_it(
    upstream: Upstream,
) -> None:
    request = chat(upstream.api_key, {"model": "plain", "messages": MESSAGES, **STREAM})
    async with connect(upstream.base_url) as conn:
        for _ in range(3):
            await conn.send(request)
            assert (await conn.head()).status == 200
            assert [piece async for piece in conn.body()]
        conn.half_close()
        assert await conn.ended() is Ended.EOF

    assert upstream.stats()["connections_opened"] == 2


def test_what_was_forwarded_can_be_read_back(upstream: Upstream) -> None:
    body = b'{"model": "plain",  "messages": [], "x": 1.50}'
    url = f"{upstream.base_url}/chat/completions"
    httpx.post(url, content=body, headers={**HEADERS, "x-odd": "1"})

    upstream.wait(lambda s: s["served"] == 1)
    (seen,) = upstream.last()
    assert seen["body"] == body
    assert ["x-odd", "1"] in seen["headers"]
    assert (seen["model"], seen["outcome"]) == ("plain", "served")
    assert upstream.stats()["models"] == {"plain": 1}


async def test_all_that_was_written_is_recorded_when_asked_for(upstream: Upstream) -> None:
    upstream.record()
    for _ in range(60):
        outcome = await raw(upstream, "plain:tokens=2", STREAM)

    seen = upstream.last()
    assert len(seen) == 60
    times, pieces = zip(*seen[-1]["written"], strict=True)
    assert "".join(pieces).encode() == outcome.body
    assert list(times) == sorted(times)
    upstream.reset()
    await raw(upstream, "plain:tokens=2", STREAM)
    assert upstream.last()[-1]["written"] == []


async def test_a_hundred_streams_at_once_are_all_served(upstream: Upstream) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(raw(upstream, f"plain:prompt={i}", STREAM)) for i in range(100)]

    assert {task.result().frames()[-1] for task in tasks} == {"[DONE]"}
    assert upstream.wait(lambda s: s["in_flight"] == 0)["served"] == 100


def test_several_choices_are_streamed_and_counted(upstream: Upstream) -> None:
    items = payloads(ask(upstream, "plain:tokens=5", n=3, **WITH_USAGE))

    assert {item["choices"][0]["index"] for item in items[:-2]} == {0, 1, 2}
    assert items[-2]["usage"]["completion_tokens"] == 15
    assert ask(upstream, "plain", n="3").status_code == 400


def test_the_provider_dies_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time\n"
        "from tests.support.upstream.launch import running_upstream\n"
        "with running_upstream(pathlib.Path(sys.argv[1])) as up:\n"
        "    print(up.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        provider = psutil.Process(int(parent.stdout.readline()))
        parent.kill()

    psutil.wait_procs([provider], timeout=5)
    assert not provider.is_running()
