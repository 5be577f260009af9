"""Somebody who calls the control plane of a running gateway: with a session, a key, or as operator.

A session is put into the authenticator's cache as a look into the till would put it there: signing
in with a wallet has tests of its own. Whoever has real sessions changes `session_of` alone.
"""

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any
from uuid import UUID

import httpx

from billing import book
from config.ids import read_id
from gateway.relay.authenticate import _Entry
from keys.api_key import digest, generate
from keys.principal import Principal
from keys.store import create_operator_key
from tests.support.gateway import PEPPER, Gateway

FOREVER_S = 1e9


class Person:
    """What one credential gets from the API."""

    def __init__(self, client: httpx.AsyncClient, account_id: UUID | None) -> None:
        self.client = client
        self._account_id = account_id

    @property
    def account_id(self) -> UUID:
        assert self._account_id is not None
        return self._account_id

    async def ask(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.request(method, f"/api/v1{path}", json=body, headers=named)

    async def get(self, path: str, status: int = 200) -> dict[str, Any]:
        return checked(await self.ask("GET", path), status)

    async def post(
        self, path: str, body: object = None, status: int = 200, **headers: str
    ) -> dict[str, Any]:
        return checked(await self.ask("POST", path, body, **headers), status)

    async def patch(self, path: str, body: object, status: int = 200) -> dict[str, Any]:
        return checked(await self.ask("PATCH", path, body), status)

    async def delete(self, path: str, status: int = 200) -> dict[str, Any]:
        return checked(await self.ask("DELETE", path), status)

    async def new_key(self, **wish: Any) -> dict[str, Any]:
        return await self.post("/keys", {"name": "test", **wish}, 201)


def checked(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The body: an object of ours, or what is in the envelope of an error."""
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"].startswith("req_")
    body: dict[str, Any] = answer.json()
    if status < 400:
        return body
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "code", "param", "doc_url", "request_id"}
    assert error["request_id"] == answer.headers["x-request-id"]
    return error


async def session_of(gateway: Gateway, account_id: UUID) -> str:
    """A bearer that is a session of an account, and no key."""
    bearer = generate("test").secret
    sealed = digest(bearer.encode(), PEPPER.encode())
    virtual_key_id = await gateway.pool.fetchval(
        "SELECT id FROM virtual_keys WHERE billing_account_id = $1 AND is_default", account_id
    )
    principal = Principal(
        account_id=account_id,
        virtual_key_id=virtual_key_id,
        app_key_id=None,
        digest=sealed,
        expires_at=None,
        account_active=True,
    )
    door = gateway.services.authenticator
    door._entries[sealed] = _Entry(door._caller(principal), time.monotonic() + FOREVER_S)
    return bearer


@asynccontextmanager
async def calling(
    gateway: Gateway, bearer: str, account_id: UUID | None = None
) -> AsyncIterator[Person]:
    headers: Mapping[str, str] = {"authorization": f"Bearer {bearer}"} if bearer else {}
    async with httpx.AsyncClient(base_url=gateway.origin, headers=headers) as client:
        yield Person(client, account_id)


@asynccontextmanager
async def signed_in(gateway: Gateway, credits: str = "1000") -> AsyncIterator[Person]:
    """Somebody with an account of their own and a session."""
    account_id = await gateway.account(credits)
    bearer = await session_of(gateway, account_id)
    async with calling(gateway, bearer, account_id) as person:
        yield person


@asynccontextmanager
async def operating(gateway: Gateway) -> AsyncIterator[Person]:
    """An operator."""
    async with book.acquire(gateway.pool) as conn:
        key = await create_operator_key(conn, "ops", pepper=PEPPER.encode())
    async with calling(gateway, key.secret) as person:
        yield person


async def note_spend(gateway: Gateway, key_id: str, days: dict[datetime, int]) -> None:
    """What a key spent, as the book keeps it."""
    for day, nanos in days.items():
        await gateway.tamper(
            "INSERT INTO scope_spend (virtual_key_id, window_start, spent_nanos, version) "
            "SELECT virtual_key_id, $2, $3, 1 FROM app_api_keys WHERE id = $1",
            read_id(key_id),
            day,
            nanos,
        )
