"""What operators and load balancers ask: /livez, /readyz, /metrics."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from billing import book
from config.secret import Secret
from keys.store import create_operator_key
from tests.support.gateway import PEPPER, Gateway, eventually, make_settings, running_gateway
from tests.support.rawclient import Outcome, RawRequest, chat, exchange
from tests.support.upstream.launch import Upstream

TOKEN = "token-of-the-metrics-reader"
HELLO = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}
WANTED = (
    'farebox_http_requests_total{code="",route="/v1/chat/completions",status="200"} 2.0',
    'farebox_http_requests_total{code="key_malformed",route="/v1/chat/completions",status="401"}',
    "farebox_overhead_seconds_count 2.0",
    'farebox_upstream_ttft_seconds_count{model="plain",provider="zoo"} 2.0',
    "farebox_inflight_requests 0.0",
    'farebox_tokens_total{model="plain",type="input"}',
    'farebox_tokens_total{model="plain",type="output"} 64.0',
    "farebox_revenue_usd_total 0.0",
    "farebox_provider_cost_usd_total 0.0",
    'farebox_settlements_total{result="committed"} 2.0',
    "farebox_settlements_pending 0.0",
    "farebox_settlement_oldest_seconds 0.0",
    "farebox_event_loop_lag_seconds ",
    'farebox_build_info{version="',
)


@pytest.fixture
async def closed(book_url: str, till_url: str, upstream: Upstream) -> AsyncIterator[Gateway]:
    """A gateway whose metrics need a credential."""
    settings = make_settings(upstream.base_url, metrics__open=False, metrics__token=Secret(TOKEN))
    async with running_gateway(book_url, till_url, upstream.base_url, settings) as gateway:
        yield gateway


async def ask(gateway: Gateway, target: str, bearer: str = "", method: str = "GET") -> Outcome:
    headers = [("authorization", f"Bearer {bearer}")] if bearer else []
    return await exchange(gateway.origin, RawRequest(method=method, target=target, headers=headers))


async def test_the_metrics_tell_what_was_served_and_earned(gateway: Gateway) -> None:
    key = await gateway.key()
    await exchange(gateway.base_url, chat(key, HELLO))
    await exchange(gateway.base_url, chat(key, {**HELLO, "stream": True}))
    await exchange(gateway.base_url, chat("wrong", HELLO))
    receipts = await gateway.receipts(2)
    await gateway.at_rest()

    async def text() -> str | None:
        said = (await ask(gateway, "/metrics")).body.decode()
        return said if all(wanted in said for wanted in WANTED) else None

    said = await eventually(text)
    revenue = next(ln for ln in said.splitlines() if ln.startswith("farebox_revenue_usd_total"))
    assert round(float(revenue.split()[1]) * 10**9) == sum(r["price_nanos"] for r in receipts)
    assert key not in said
    assert "acct_" not in said


async def test_closed_metrics_open_to_the_token_and_to_operators_only(closed: Gateway) -> None:
    async with book.acquire(closed.pool) as conn:
        operator = await create_operator_key(conn, "ops", pepper=PEPPER.encode())
    customer = await closed.key()
    almost = operator.secret[:-1] + ("a" if operator.secret[-1] != "a" else "b")

    for bearer in ("", "wrong", customer, almost):
        refused = await ask(closed, "/metrics", bearer)
        assert refused.status == 401
        assert refused.json()["error"]["type"] == "authentication_error"
        assert refused.head is not None
        assert refused.head.get("www-authenticate") == "Bearer"
    for bearer in (TOKEN, operator.secret):
        assert (await ask(closed, "/metrics", bearer)).status == 200
    inferring = await exchange(closed.base_url, chat(operator.secret, HELLO))
    assert inferring.status == 401


async def test_an_operator_key_cannot_be_looked_up_without_the_book(closed: Gateway) -> None:
    async with book.acquire(closed.pool) as conn:
        operator = await create_operator_key(conn, "ops", pepper=PEPPER.encode())
    closed.pool.terminate()

    answer = await ask(closed, "/metrics", operator.secret)
    assert (answer.status, answer.json()["error"]["code"]) == (503, "unavailable")
    assert (await ask(closed, "/metrics", TOKEN)).status == 200


async def test_readiness_names_what_is_failing(gateway: Gateway) -> None:
    async def ready() -> tuple[int, list[str]]:
        answer = await ask(gateway, "/readyz")
        return answer.status, answer.json()["failing"]

    assert await ready() == (200, [])
    gateway.services.is_draining = True
    assert await ready() == (503, ["draining"])
    refused = await exchange(gateway.base_url, chat(await gateway.key(), HELLO))
    assert refused.status == 503
    await gateway.services.link.close()
    assert await ready() == (503, ["till", "draining"])
    gateway.pool.terminate()
    assert await ready() == (503, ["till", "book", "draining"])
    assert (await ask(gateway, "/livez")).status == 200


@pytest.mark.parametrize(
    ("method", "target", "status", "code"),
    [
        ("GET", "/", 404, "unknown_url"),
        ("GET", "/metrics/x", 404, "unknown_url"),
        ("POST", "/livez", 405, "method_not_allowed"),
        ("DELETE", "/metrics", 405, "method_not_allowed"),
    ],
)
async def test_what_the_control_plane_refuses_has_the_envelope(
    gateway: Gateway, method: str, target: str, status: int, code: str
) -> None:
    answer = await ask(gateway, target, method=method)

    error = answer.json()["error"]
    assert (answer.status, error["code"]) == (status, code)
    assert error["request_id"].startswith("req_")
    assert answer.head is not None
    assert answer.head.get("x-request-id") == error["request_id"]


async def test_probes_answer_while_requests_run(gateway: Gateway) -> None:
    key = await gateway.key()
    calls = [exchange(gateway.base_url, chat(key, HELLO)) for _ in range(50)]
    probes = [ask(gateway, target) for target in ("/readyz", "/livez", "/metrics") * 5]

    answers = await asyncio.gather(*calls, *probes)

    assert {answer.status for answer in answers} == {200}
