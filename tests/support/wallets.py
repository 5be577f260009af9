"""Wallets that sign in over HTTP, without a browser."""

import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import msgspec
from eth_account import Account
from eth_account.messages import encode_defunct

from keys.identity_store import Wallet, sign_in
from keys.session import Session
from tests.support.gateway import Gateway

NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class KeyWallet:
    """A wallet that is a private key."""

    def __init__(self, key: str | None = None) -> None:
        self.account = Account.from_key(key) if key else Account.create()
        self.address: str = self.account.address

    def sign(self, message: str) -> str:
        signed = self.account.sign_message(encode_defunct(text=message))
        return "0x" + bytes(signed.signature).hex()


def stamp(shift_s: float = 0) -> str:
    """A moment as sign-in messages write it, from now."""
    moment = datetime.now(UTC) + timedelta(seconds=shift_s)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def write_message(address: str, said: dict[str, Any], /, **changes: Any) -> str:
    """The message that a wallet shows, of what the nonce endpoint said; None leaves a line out."""
    parts = {
        "statement": "Sign in to Farebox.",
        "uri": said["uri"],
        "domain": said["domain"],
        "version": "1",
        "chain_id": 8453,
        "nonce": said["nonce"],
        "issued_at": stamp(),
        **changes,
    }
    lines = [
        f"{parts['domain']} wants you to sign in with your Ethereum account:",
        address,
        "",
        *([parts["statement"]] if parts["statement"] else []),
        "",
        f"URI: {parts['uri']}",
        f"Version: {parts['version']}",
        f"Chain ID: {parts['chain_id']}",
        f"Nonce: {parts['nonce']}",
        f"Issued At: {parts['issued_at']}",
    ]
    named = {"Expiration Time": "expiration_time", "Not Before": "not_before"}
    named["Request ID"] = "request_id"
    lines += [f"{name}: {parts[key]}" for name, key in named.items() if parts.get(key) is not None]
    if parts.get("resources") is not None:
        lines += ["Resources:", *(f"- {resource}" for resource in parts["resources"])]
    return "\n".join(lines)


class Visitor:
    """A client with a cookie jar, as a browser that came from the gateway's own page."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def nonce(self) -> dict[str, Any]:
        answer = await self.client.post("/api/v1/auth/nonce")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def verify(self, message: str, signature: str, path: str = "verify") -> httpx.Response:
        body = {"message": message, "signature": signature}
        return await self.client.post(f"/api/v1/auth/{path}", json=body)

    async def sign_in(self, wallet: Any, path: str = "verify", **changes: Any) -> httpx.Response:
        """Ask for a nonce, sign, and come back."""
        message = write_message(wallet.address, await self.nonce(), **changes)
        return await self.verify(message, wallet.sign(message), path)

    async def session(self) -> httpx.Response:
        return await self.client.get("/api/v1/auth/session")


async def enter(gateway: Gateway, visitor: Visitor, wallet: KeyWallet | None = None) -> Session:
    """A session, as signing in makes one, without waiting for who verifies signatures."""
    address = (wallet or KeyWallet()).address
    identity, _ = await sign_in(gateway.pool, Wallet(address=address, kind="eoa"))
    now = int(time.time())
    session = Session(
        **msgspec.structs.asdict(identity),
        wallet=address,
        kind="eoa",
        created_at=now,
        expires_at=now + 3600,
    )
    secret = await gateway.services.sign_in.sessions.begin(session)
    visitor.client.cookies.set("farebox", secret, domain="127.0.0.1")
    return session


@asynccontextmanager
async def visiting(gateway: Gateway | str) -> AsyncIterator[Visitor]:
    """A new visitor of a gateway, or of a worker at an origin."""
    origin = gateway if isinstance(gateway, str) else gateway.origin
    headers = {"origin": origin}
    # Reading certificates takes longer than all the rest, and nothing here is encrypted.
    transport = httpx.AsyncHTTPTransport(verify=NO_CERTIFICATES)
    async with httpx.AsyncClient(
        base_url=origin, headers=headers, timeout=60, transport=transport
    ) as client:
        yield Visitor(client)
