"""The OpenAPI document, and the page that shows it."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from gateway.api import docs
from tests.support.gateway import Gateway

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def client(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=gateway.origin, timeout=20) as client:
        yield client


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }


async def test_the_document_tells_of_every_route_and_who_may_call_it(
    client: httpx.AsyncClient,
) -> None:
    answer = await client.get("/openapi.json")

    document = answer.json()
    found = operations(document)
    assert answer.headers["content-type"] == "application/json"
    assert document["openapi"].startswith("3.1")
    assert {"POST /v1/chat/completions", "GET /v1/models", "GET /livez"} <= found.keys()
    for name, operation in found.items():
        assert "security" in operation, name
        assert operation["responses"]["default"]["content"]["application/json"], name
    assert len({operation["operationId"] for operation in found.values()}) == len(found)


async def test_every_reference_of_the_document_leads_somewhere(client: httpx.AsyncClient) -> None:
    answer = await client.get("/openapi.json")

    components = answer.json()["components"]
    references = set(re.findall(r'"\$ref":"#/components/(\w+)/([^"]+)"', answer.text))
    assert references
    for kind, name in references:
        assert name in components[kind]


async def test_the_page_loads_nothing_from_elsewhere(client: httpx.AsyncClient) -> None:
    page = await client.get("/docs")
    parts = re.findall(r'(?:src|href)="([^"]+)"', page.text)

    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert len(parts) == 4
    for part in parts:
        assert part.startswith("/docs/")
        got = await client.get(part)
        assert got.status_code == 200, part
        assert got.content


async def test_the_page_has_no_other_parts(client: httpx.AsyncClient) -> None:
    names = ("swagger-ui-bundle.js.map", "..%2f__init__.py", "%2e%2e/%2e%2e", "index.html", "x")
    for name in names:
        answer = await client.get(f"/docs/{name}")

        assert answer.status_code == 404, name
        assert answer.json()["error"]["code"] == "unknown_url"


async def test_the_document_is_made_once_however_many_ask_first(gateway: Gateway) -> None:
    """It is made on the threads of large bodies, which waited for as many as had asked."""
    made = []

    def document() -> bytes:
        made.append(True)
        return b"{}"

    ask = docs.handlers(gateway.services, document)[0].fn
    answers = await asyncio.gather(*(ask() for _ in range(50)))

    assert {answer.content for answer in answers} == {b"{}"}
    assert len(made) == 1
